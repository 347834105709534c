"""Compile every kernel for GPUs that are not here, and read what the compilers say of the result.

    python tests/aot.py                 print the table
    python tests/aot.py --write         remake kernels/benchmarks/aot.csv
    python tests/aot.py --exponents     what computes each exponent of attention

An op is called on meta tensors of the model's real shapes, forward and backward, with a recorder in
the place of _launch.launch. So what is compiled is what the op's own code would launch: its block
sizes for that GPU, its strides (a 1, or a multiple of 16, specialises a kernel) and its constants.
An op whose host code looked at a value on the device would fail here too.

To cover a new kernel, add a call of its op to CASES.
"""

import os
import tempfile

# Read by Triton as it is imported: real kernels, compiled anew.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="aot-")

import argparse
import atexit
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import qwen2audio_kernels as kernels
from qwen2audio_kernels import _launch

atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks" / "aot.csv"
COLUMNS = (
    "case",
    "kernel",
    "arch",
    "warps",
    "registers",
    "shared_bytes",
    "spill_bytes",
    "matrix_instructions",
    "scalar_dots",
    "waits",
    "triton",
)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def t(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    """A tensor without storage; floating ones want a gradient."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.requires_grad_(grad and x.is_floating_point())


def integers(*shape: int) -> Tensor:
    return fixed(*shape, dtype=torch.int64)


def quantised(bits: int, outputs: int) -> dict[str, Tensor]:
    """Weight and scale of a linear layer of 4096 inputs, as kernels.linear takes them."""
    if bits == 8:
        return {"weight": fixed(outputs, 4096, dtype=torch.int8), "scale": fixed(outputs)}
    weight = fixed(outputs, 2048, dtype=torch.uint8)
    return {"weight": weight, "scale": fixed(32, outputs, 2)}


def fixed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As `t`, and wants no gradient."""
    return t(*shape, dtype=dtype, grad=False)


def qkv(positions: int, heads: int, kv_heads: int, channels: int) -> tuple[Tensor, ...]:
    """Views into one fused projection, as the packed model has them."""
    fused = t(1, positions, (heads + 2 * kv_heads) * channels)
    return fused.view(1, positions, -1, channels).split((heads, kv_heads, kv_heads), dim=2)


# Name -> a call of one op at the model's shapes: 800 positions of width 4096 in the decoder, 1500
# of width 1280 in the encoder, bfloat16. Whatever it returns is differentiated if it can be.
CASES: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: kernels.rms_norm(t(1, 800, 4096), t(4096), 1e-5),
    "add_rms_norm": lambda: kernels.add_rms_norm(t(1, 800, 4096), t(1, 800, 4096), t(4096), 1e-5),
    "layer_norm": lambda: kernels.layer_norm(t(1500, 1280), t(1280), t(1280), 1e-5),
    "add_layer_norm": lambda: kernels.add_layer_norm(
        t(1500, 1280), t(1500, 1280), t(1280), t(1280), 1e-5
    ),
    "add_layer_norm float32 8192": lambda: kernels.add_layer_norm(
        *(t(*shape, dtype=torch.float32) for shape in [(8, 8192)] * 2 + [(8192,)] * 2), 1e-5
    ),
    "rope": lambda: kernels.rope(*qkv(800, 32, 32, 128)[:2], fixed(1, 800, 64), fixed(1, 800, 64)),
    "rope_into_cache": lambda: kernels.rope_into_cache(
        *(x[0].detach() for x in qkv(8, 32, 32, 128)),
        *(fixed(8, 64) for _ in ("cos", "sin")),
        *(fixed(8, 2048, 32, 128) for _ in "kv"),
        *(integers(8) for _ in ("rows", "positions")),
    ),
    "rope_into_cache int8": lambda: kernels.rope_into_cache(
        *(x[0].detach() for x in qkv(8, 32, 32, 128)),
        *(fixed(8, 64) for _ in ("cos", "sin")),
        *(fixed(8, 2048, 32, 128, dtype=torch.int8) for _ in "kv"),
        *(integers(8) for _ in ("rows", "positions")),
        *(fixed(8, 2048, 32, dtype=torch.float32) for _ in "kv"),
    ),
    "swiglu": lambda: kernels.swiglu(*t(1, 800, 2 * 11008).chunk(2, dim=-1)),
    "gelu": lambda: kernels.gelu(t(1, 1500, 5120)),
    "bias_gelu": lambda: kernels.bias_gelu(t(1, 1500, 5120), t(5120)),
    "attention encoder": lambda: kernels.attention(*qkv(1500, 20, 20, 64)),
    "attention decoder": lambda: kernels.attention(
        *qkv(800, 32, 32, 128), causal=True, key_start=integers(1)
    ),
    "decode_attention": lambda: kernels.decode_attention(
        fixed(8, 32, 128), *(fixed(8, 2048, 32, 128) for _ in "kv"), integers(8), integers(8)
    ),
    "decode_attention int8": lambda: kernels.decode_attention(
        fixed(8, 32, 128),
        *(fixed(8, 2048, 32, 128, dtype=torch.int8) for _ in "kv"),
        integers(8),
        None,
        *(fixed(8, 2048, 32, dtype=torch.float32) for _ in "kv"),
    ),
    **{
        f"linear {name} M={rows}": lambda rows=rows, weight=weight: kernels.linear(
            fixed(rows, 4096), **weight, swiglu=True
        )
        for rows in (1, 32)
        for name, weight in (
            ("bfloat16", {"weight": fixed(22016, 4096)}),
            ("int8", quantised(8, 22016)),
            ("int4", quantised(4, 22016)),
        )
    },
    "linear residual M=1": lambda: kernels.linear(
        fixed(1, 11008), fixed(4096, 11008), residual=fixed(1, 4096)
    ),
    "log_mel": lambda: kernels.log_mel(fixed(480000, dtype=torch.float32)),
    "sample": lambda: kernels.sample(
        fixed(8, 156032),
        *(fixed(8, dtype=torch.float32) for _ in ("uniform", "temperature")),
        fixed(8, dtype=torch.int32),
        *(fixed(8, dtype=torch.float32) for _ in ("top_p", "penalty")),
        fixed(8, 156032, dtype=torch.bool),
    ),
    "cross_entropy": lambda: kernels.cross_entropy(t(2048, 4096), t(156032, 4096), integers(2048)),
}


@triton.jit
def flawed_kernel(x_ptr, BLOCK: tl.constexpr):
    """What the checks are for: a product without matrix instructions, in far too few threads."""
    across = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + across[:, None] * BLOCK + across[None, :])
    y = tl.dot(x, x, input_precision="ieee")
    tl.store(x_ptr + across[:, None] * BLOCK + across[None, :], y)


@triton.jit
def hasty_kernel(x_ptr, OVERLAP: tl.constexpr):
    """May start before the one in front of it has ended, and reads what that one writes."""
    x = tl.load(x_ptr)
    _launch.begin(OVERLAP)
    tl.store(x_ptr, x + 1)


FLAWED = {
    "flawed": lambda: _launch.launch(
        flawed_kernel, (1,), t(64, 64, dtype=torch.float32), BLOCK=64, num_warps=1
    ),
    "hasty": lambda: _launch.launch(hasty_kernel, (1,), t(1, dtype=torch.float32)),
}


def launches(call: Callable[[], Any], arch: str) -> Iterator[tuple[Any, dict[str, Any], dict]]:
    """(kernel, arguments by name, launch options) of every launch of a case on an architecture."""
    seen: list[tuple[Any, dict[str, Any], dict]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
        assert 0 not in grid, f"{kernel.__name__}: empty grid {grid}"
        keywords |= _launch.overlap(kernel, arch)
        by_name = dict(zip(kernel.arg_names, arguments, strict=False))
        options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
        by_name |= {k: v for k, v in keywords.items() if k in kernel.arg_names}
        assert set(by_name) == set(kernel.arg_names), f"{kernel.__name__}: {list(by_name)}"
        seen.append((kernel, by_name, {"enable_fp_fusion": True, **options}))

    real = {
        name: getattr(_launch, name) for name in ("launch", "arch", "processors", "check_device")
    }
    _launch.launch = record
    _launch.arch = lambda device: arch
    _launch.processors = lambda device: 132
    _launch.check_device = lambda op, **tensors: None
    try:
        result = call()
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        outputs = [y for y in outputs if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    finally:
        for name, function in real.items():
            setattr(_launch, name, function)
    unique = {}
    for kernel, arguments, options in seen:
        source = specialise(kernel, arguments)
        unique.setdefault((kernel.__name__, source.hash(), str(options)), (kernel, source, options))
    yield from unique.values()


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def specialise(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """Types, constants and alignments of the arguments, as Triton's own launcher takes them."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (one and not isinstance(value, bool)):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        aligned = False
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is a {type(value).__name__}")
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def waits_first(sass: str) -> bool:
    """Whether a kernel waits for the one in front of it before it reads or writes any memory.

    What it asks the cache to fetch (CCTL) is no read: it gets no value.
    """
    made = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass)
    memory = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLK")
    # Arguments, and the program's own memory.
    own = ("LDC", "LDCU", "LDS", "LDSM", "STS", "ATOMS")
    touched = [i for i, op in enumerate(made) if op.startswith(memory) and op not in own]
    return "ACQBULK" in made and made.index("ACQBULK") < min(touched, default=len(made))


def measure(case: str, kernel: Any, source: ASTSource, options: dict, arch: str) -> dict[str, str]:
    """Compile one kernel for one architecture; one row of the table."""
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    waits = ""
    if arch.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path

            def dump(what: str) -> str:
                command = [tool, what, file.name]
                return subprocess.run(command, check=True, capture_output=True, text=True).stdout

            usage = dump("-res-usage")
            if options.get("launch_pdl"):
                waits = "first" if waits_first(dump("-sass")) else "late"
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spill = int(re.search(r"STACK:(\d+)", usage)[1])
        matrix = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spill = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        matrix = re.findall(r"v_mfma", text)
    # A dot whose result still lies in a layout of plain threads was left to multiply-adds.
    scalar = re.findall(r"tt\.dot .*-> tensor<[^>]*#blocked", compiled.asm["ttgir"])
    values = (
        case,
        kernel.__name__,
        arch,
        compiled.metadata.num_warps,
        registers,
        compiled.metadata.shared,
        spill,
        f"{len(matrix)} {matrix[0]}" if matrix else "",
        len(scalar),
        waits,
        triton.__version__,
    )
    return dict(zip(COLUMNS, map(str, values), strict=True))


def rows(cases: dict[str, Callable[[], Any]], targets: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for case, call in cases.items():
        for arch in targets:
            for kernel, source, options in launches(call, arch):
                yield measure(case, kernel, source, options, arch)


def exponents() -> Iterator[dict[str, str]]:
    """The instructions whose results attention's kernels take exponentials of, for sm_90.

    Whole and masked blocks of keys run different code. Where the compiler fuses a multiplication
    into one of them and not into the other, they round apart and a row depends on its padding.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for causal in (False, True):

            def call(dtype: torch.dtype = dtype, causal: bool = causal) -> Tensor:
                q, k, v = (t(2, 100, 2, 64, dtype=dtype) for _ in "qkv")
                return kernels.attention(q, k, v, causal, integers(2))

            for kernel, source, options in launches(call, "sm_90"):
                ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
                made = re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*)\s+(%\w+),", ptx, re.M)
                makers = {register: instruction for instruction, register in made}
                taken = re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", ptx)
                yield {
                    "case": f"{dtype} causal={causal}",
                    "kernel": kernel.__name__,
                    "instructions": " ".join(sorted({makers[register] for register in taken})),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time.")
    parser.add_argument("--write", action="store_true", help=f"remake {TABLE.name}")
    parser.add_argument("--flawed", action="store_true", help="a kernel that the test must reject")
    parser.add_argument("--exponents", action="store_true", help="of attention, on sm_90")
    parser.add_argument("--case", help="only the cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.write and (arguments.exponents or arguments.flawed or arguments.case):
        parser.error("--write remakes the whole table and goes with no other option")
    columns: tuple[str, ...] = COLUMNS
    if arguments.flawed:
        found = list(rows(FLAWED, ("sm_90",)))
    elif arguments.exponents:
        found = list(exponents())
        columns = ("case", "kernel", "instructions")
    else:
        cases = {k: v for k, v in CASES.items() if (arguments.case or "") in k}
        found = list(rows(cases, tuple(TARGETS)))
    with TABLE.open("w", newline="") if arguments.write else sys.stdout as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
