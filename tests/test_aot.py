"""Every kernel compiles for four GPUs with none present, without a spill and with its dots on
matrix instructions; what it takes of each GPU is kept in kernels/benchmarks/aot.csv."""

import ast
import csv
import importlib.util
import io
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "kernels" / "benchmarks" / "aot.csv"
PACKAGE = TESTS.parent / "kernels" / "qwen2audio_kernels"
ARCHES = {"sm_80", "sm_90", "sm_100", "gfx942"}
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Products in float32 on purpose, which NVIDIA's matrix instructions do not make: the power spectrum
# spans more than the 10 bits of tf32.
EXACT_DOTS = {"log_mel_fwd_kernel"}
# Bytes of registers that a thread may spill with another Triton than that of the table: 3.9 spills
# 40 in one kernel and 8 in two where 3.6 spills none, with the same blocks.
FEW_BYTES = 64

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow  # it compiles every kernel four times, about two minutes

Row = dict[str, str]


def compile_ahead(*arguments: str) -> list[Row]:
    # A process of its own: in this one Triton may be interpreting.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "kernels")])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "aot.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


@cache
def recorded() -> list[Row]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def problems(row: Row) -> list[str]:
    """What forbids launching this kernel, or makes it a slow one."""
    found = []
    if int(row["spill_bytes"]) > (0 if row["triton"] == recorded()[0]["triton"] else FEW_BYTES):
        found.append(f"spills {row['spill_bytes']} bytes of registers a thread")
    if int(row["scalar_dots"]) and row["kernel"] not in EXACT_DOTS:
        found.append(f"{row['scalar_dots']} dots did not become matrix instructions")
    if int(row["shared_bytes"]) > SHARED_LIMIT[row["arch"]]:
        found.append(f"takes {row['shared_bytes']} bytes of shared memory")
    if row["waits"] == "late":
        found.append("touches memory before the kernel in front of it has ended")
    return found


@pytest.fixture(scope="module")
def compiled() -> list[Row]:
    return compile_ahead()


def test_no_spills_and_dots_on_matrix_instructions(compiled: list[Row]) -> None:
    bad = [f"{r['case']}: {r['kernel']} on {r['arch']} {p}" for r in compiled for p in problems(r)]
    assert not bad, "\n".join(bad)


def test_every_kernel_is_compiled_for_every_architecture(compiled: list[Row]) -> None:
    expected = {
        node.name
        for file in PACKAGE.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert expected
    found = {(row["kernel"], row["arch"]) for row in compiled}
    missing = {(kernel, arch) for kernel in expected for arch in ARCHES} - found
    assert not missing, f"add a call to CASES in tests/aot.py: {sorted(missing)}"


def test_the_kernels_of_a_step_overlap(compiled: list[Row]) -> None:
    """From Hopper on; a kernel in between that does not would be waited for."""
    step = {
        *("rms_norm_fwd_kernel", "linear_fwd_kernel", "linear_reduce_kernel"),
        *("rope_into_cache_kernel", "decode_attention_part_kernel", "decode_attention_join_kernel"),
        *("sample_scores_kernel", "sample_draw_kernel"),
    }
    assert {row["kernel"] for row in compiled if row["waits"]} == step
    for row in compiled:
        able = row["kernel"] in step and row["arch"] in ("sm_90", "sm_100")
        assert row["waits"] == ("first" if able else ""), row


def test_the_table_is_current(compiled: list[Row]) -> None:
    table = recorded()
    if table[0]["triton"] != compiled[0]["triton"]:
        pytest.skip(f"the table is of Triton {table[0]['triton']}, here is another")
    changed = [f"{r}" for r in compiled if r not in table]
    assert table == compiled, "\n".join(["python tests/aot.py --write; changed:", *changed])


def test_masked_and_whole_blocks_of_attention_round_alike() -> None:
    found = compile_ahead("--exponents")
    assert {row["kernel"] for row in found} >= {"attention_fwd_kernel", "attention_bwd_dq_kernel"}
    for row in found:
        few = row["instructions"].split()
        assert len(few) == (0 if "delta" in row["kernel"] else 1), row


def test_the_checks_reject_a_flawed_kernel() -> None:
    found = [problem for row in compile_ahead("--flawed") for problem in problems(row)]
    assert len(found) == 3
    assert "spills" in found[0]
    assert "did not become matrix instructions" in found[1]
    assert "touches memory before" in found[2]


@pytest.mark.parametrize(("another", "most"), [(False, 0), (True, FEW_BYTES)])
def test_another_triton_may_spill_a_few_registers(another: bool, most: int) -> None:
    row = {**recorded()[0], "scalar_dots": "0", "shared_bytes": "0"}
    row["triton"] += "x" * another
    assert not problems({**row, "spill_bytes": str(most)})
    assert problems({**row, "spill_bytes": str(most + 1)})


def test_the_checks_reject_too_much_shared_memory() -> None:
    row = {
        "kernel": "",
        "triton": "",
        "spill_bytes": "0",
        "scalar_dots": "0",
        "waits": "",
        "shared_bytes": "65537",
    }
    assert problems({**row, "arch": "gfx942"}) == ["takes 65537 bytes of shared memory"]
    assert not problems({**row, "arch": "sm_80"})
