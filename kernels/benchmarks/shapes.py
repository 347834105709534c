"""The model's real shapes, op by op: what bench.py runs, against what, and what it should cost.

Letters as everywhere: B batch, T queries, S keys, H and G heads, C channels, D width, V words. The
encoder is 1,280 wide with 20 heads of 64, 1,500 frames for 30 s and 150 for 3 s; the decoder 4,096
with 32 heads of 128, an MLP of 11,008 and 156,032 words. `quick` shrinks the sizes and keeps the
cases, for a run through Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import frontend, ops, sampling

EPS = 1e-5
Function = Callable[..., Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    inputs     draws them, floats in float32; those in `exact` stay so, the rest is rounded
    kernel     called with the inputs by name, as all functions here
    plain      the op in torch as the tests know it: what the numbers are checked against
    check      called with the inputs in its place, where the three-way rule does not fit
    peers      name -> function to race; "torch" is the fastest that PyTorch offers
    peer_inputs  from the kernel's inputs to the peers', where they differ
    ceiling    the measured limit that binds: "copy", "read" (bytes) or "matmul" (operations)
    work       bytes moved at least, or operations, of the forward pass
    gradients  inputs to differentiate by; () where the op has no backward
    work_both  work of forward and backward together
    graph      whether everything here can be recorded in a CUDA graph: no look at a value
    tunes      kernels of tuned.json that this case times: (key, "forward" or "both")
    """

    op: str
    shape: str
    inputs: Callable[[], Inputs]
    kernel: Function
    plain: Function
    peers: dict[str, Function]
    ceiling: str
    work: float
    gradients: tuple[str, ...] = ()
    work_both: float = 0.0
    graph: bool = True
    exact: tuple[str, ...] = ()
    peer_inputs: Callable[[Inputs], Inputs] = lambda inputs: inputs
    check: Callable[[Inputs], None] | None = None
    tunes: tuple[tuple[str, str], ...] = field(default=())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def cases(quick: bool, bits: int = 16) -> Iterator[Case]:
    """All cases; bits of the floating type, for counting bytes."""
    byte = bits // 8
    yield from norms(quick, byte)
    yield from elementwise(quick, byte)
    yield from attentions(quick)
    yield from packed(quick)
    yield from decoding(quick, byte)
    yield from linears(quick, byte)
    yield from ends(quick, byte)


def norms(quick: bool, byte: int) -> Iterator[Case]:
    liger_rms, liger_layer = liger("rms_norm"), liger("layer_norm")
    for rows in (2,) if quick else (1, 32, 800, 8 * 800):
        D = 256 if quick else 4096
        size = rows * D * byte
        yield Case(
            "rms_norm",
            f"{rows} x {D}",
            lambda rows=rows, D=D: {"x": normal(rows, D), "weight": 1 + 0.1 * normal(D)},
            partial(kernels.rms_norm, eps=EPS),
            partial(ops.rms_norm, eps=EPS),
            {
                "torch": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
                "eager": partial(ops.rms_norm, eps=EPS),
            }
            | liger_rms,
            "copy",
            2 * size,
            ("x", "weight"),
            5 * size,
        )
        yield Case(
            "add_rms_norm",
            f"{rows} x {D}",
            lambda rows=rows, D=D: {
                "x": normal(rows, D),
                "residual": normal(rows, D),
                "weight": 1 + 0.1 * normal(D),
            },
            partial(kernels.add_rms_norm, eps=EPS),
            partial(ops.add_rms_norm, eps=EPS),
            {"torch": fused_add(F.rms_norm), "eager": partial(ops.add_rms_norm, eps=EPS)},
            "copy",
            4 * size,
            ("x", "residual", "weight"),
            8 * size,
        )
    for rows in (3,) if quick else (150, 1500, 32 * 1500):
        D = 160 if quick else 1280
        size = rows * D * byte
        yield Case(
            "layer_norm",
            f"{rows} x {D}",
            lambda rows=rows, D=D: {
                "x": normal(rows, D),
                "weight": 1 + 0.1 * normal(D),
                "bias": normal(D),
            },
            partial(kernels.layer_norm, eps=EPS),
            partial(ops.layer_norm, eps=EPS),
            {"torch": partial(ops.layer_norm, eps=EPS)} | liger_layer,
            "copy",
            2 * size,
            ("x", "weight", "bias"),
            5 * size,
        )
        yield Case(
            "add_layer_norm",
            f"{rows} x {D}",
            lambda rows=rows, D=D: {
                "x": normal(rows, D),
                "residual": normal(rows, D),
                "weight": 1 + 0.1 * normal(D),
                "bias": normal(D),
            },
            partial(kernels.add_layer_norm, eps=EPS),
            partial(ops.add_layer_norm, eps=EPS),
            {"torch": partial(ops.add_layer_norm, eps=EPS)},
            "copy",
            4 * size,
            ("x", "residual", "weight", "bias"),
            8 * size,
        )


def fused_add(norm: Function) -> Function:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return norm(summed, weight.shape, weight, EPS), summed

    return run


def elementwise(quick: bool, byte: int) -> Iterator[Case]:
    H, C = (2, 32) if quick else (32, 128)
    for B, T in ((1, 3),) if quick else ((32, 1), (1, 800), (8, 800)):
        size = B * T * H * C * byte

        def rope_inputs(B: int = B, T: int = T) -> Inputs:
            cos, sin = ops.rope_tables(torch.arange(T)[None], C, 10_000.0, torch.float32)
            return {"q": normal(B, T, H, C), "k": normal(B, T, H, C), "cos": cos, "sin": sin}

        yield Case(
            "rope",
            f"{B} x {T} x {H} + {H} heads of {C}",
            rope_inputs,
            kernels.rope,
            ops.rope,
            {"torch": ops.rope},
            "copy",
            4 * size,
            ("q", "k"),
            8 * size,
            tunes=(("rope", "forward"),) if T >= 3 and B == 1 else (),
        )
    for N in (3,) if quick else (1, 8, 32):

        def tokens(N: int = N) -> Inputs:
            cos, sin = ops.rope_tables(torch.arange(N)[None], C, 10_000.0, torch.float32)
            caches = {
                name: normal(N, 4 if quick else 1024, H, C) for name in ("k_cache", "v_cache")
            }
            return {
                **{name: normal(N, H, C) for name in "qkv"},
                **{"cos": cos[0], "sin": sin[0], **caches},
                **{"rows": torch.arange(N), "positions": torch.full((N,), 3)},
            }

        yield Case(
            "rope_into_cache",
            f"{N} x {H} + {H} heads of {C}",
            tokens,
            kernels.rope_into_cache,
            ops.rope_into_cache,
            {"torch": ops.rope_into_cache},
            "copy",
            7 * N * H * C * byte,  # q, k and v; q and k turned, k and v in the cache
        )
    D = 192 if quick else 11008
    for rows in (2,) if quick else (1, 32, 800):
        size = rows * D * byte
        yield Case(
            "swiglu",
            f"{rows} x {D}",
            lambda rows=rows: {"gate": normal(rows, D), "up": normal(rows, D)},
            kernels.swiglu,
            ops.swiglu,
            {"torch": ops.swiglu} | liger("swiglu"),
            "copy",
            3 * size,
            ("gate", "up"),
            8 * size,
            tunes=(("swiglu", "forward"),) if rows in (2, 800) else (),
        )
    D = 192 if quick else 5120
    for rows in (2,) if quick else (150, 1500, 8 * 1500):
        size = rows * D * byte
        yield Case(
            "gelu",
            f"{rows} x {D}",
            lambda rows=rows: {"x": normal(rows, D)},
            kernels.gelu,
            ops.gelu,
            {"torch": ops.gelu},
            "copy",
            2 * size,
            ("x",),
            5 * size,
            tunes=(("gelu", "forward"),) if rows in (2, 1500) else (),
        )
        yield Case(
            "bias_gelu",
            f"{rows} x {D}",
            lambda rows=rows: {"x": normal(rows, D), "bias": normal(D)},
            kernels.bias_gelu,
            ops.bias_gelu,
            {"torch": ops.bias_gelu},
            "copy",
            2 * size,
            ("x", "bias"),
            6 * size,
        )


def attentions(quick: bool) -> Iterator[Case]:
    encoder = ((1, 40),) if quick else ((1, 150), (1, 1500), (8, 1500), (32, 150))
    decoder = (
        ((1, 40, 40), (1, 3, 40))
        if quick
        else ((1, 128, 128), (1, 800, 800), (8, 800, 800), (1, 2048, 2048), (1, 64, 864))
    )
    H, C = (1, 64) if quick else (20, 64)
    for B, T in encoder:
        tuned = encoder[min(1, len(encoder) - 1)] == (B, T)
        yield attention_case("encoder", B, T, T, H, C, False, tuned)
    H, C = (1, 128) if quick else (32, 128)
    for B, T, S in decoder:
        tuned = decoder[0 if quick else 1] == (B, T, S)
        yield attention_case("decoder", B, T, S, H, C, True, tuned)


def attention_case(
    part: str, B: int, T: int, S: int, H: int, C: int, causal: bool, tuned: bool
) -> Case:
    def inputs() -> Inputs:
        return {"q": normal(B, T, H, C), "k": normal(B, S, H, C), "v": normal(B, S, H, C)}

    pairs = T * S - T * (T - 1) // 2 if causal else T * S
    work = 4.0 * B * H * C * pairs
    stages = (("fwd", "forward"), ("bwd_dq", "both"), ("bwd_dkv", "both"))
    return Case(
        "attention",
        f"{part}: {B} x {T} queries, {S} keys, {H} heads of {C}{', causal' if causal else ''}",
        inputs,
        partial(kernels.attention, causal=causal),
        partial(ops.attention, causal=causal),
        {
            "torch": partial(ops.sdpa, causal=causal),
            "eager": partial(ops.attention, causal=causal),
        }
        | flash_attention(causal),
        "matmul",
        work,
        ("q", "k", "v"),
        3.5 * work,
        tunes=tuple((f"attention_{key}_{C}", run) for key, run in stages) if tuned else (),
    )


def packed(quick: bool) -> Iterator[Case]:
    """Clips laid end to end in the encoder, against the same clips padded to the longest."""
    H, C = (1, 64) if quick else (20, 64)
    batches = (
        {"3 clips": (20, 7, 33)}
        if quick
        else {"32 clips of 3 s": (150,) * 32, "8 clips of 3 to 30 s": (150, 250, 500, 1500) * 2}
    )
    for name, lengths in batches.items():
        work = 4.0 * H * C * sum(length**2 for length in lengths)
        yield Case(
            "attention_varlen",
            f"encoder: {name}, {H} heads of {C}",
            partial(packed_inputs, lengths, H, C),
            partial(kernels.attention_varlen, max_seqlen=max(lengths)),
            partial(packed_plain, lengths),
            {"torch": ops.sdpa},
            "matmul",
            work,
            ("q", "k", "v"),
            3.5 * work,
            peer_inputs=partial(padded, lengths),
        )


def packed_inputs(lengths: tuple[int, ...], H: int, C: int) -> Inputs:
    found = {name: normal(sum(lengths), H, C) for name in "qkv"}
    return found | {"cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)}


def packed_plain(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, **_: Tensor) -> Tensor:
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([ops.attention(*(x[None] for x in piece))[0] for piece in pieces])


def padded(lengths: tuple[int, ...], inputs: Inputs) -> Inputs:
    """(B, T, H, C), with the ends of the clips where they differ."""
    found = {
        name: torch.nn.utils.rnn.pad_sequence(inputs[name].split(lengths), batch_first=True)
        for name in "qkv"
    }
    if len(set(lengths)) > 1:
        found["key_end"] = inputs["cu_seqlens"].diff()
    return found


def decoding(quick: bool, byte: int) -> Iterator[Case]:
    H, C = (2, 128) if quick else (32, 128)
    sizes = ((2, 140),) if quick else ((1, 1024), (8, 1024), (32, 1024), (1, 8192))
    for B, S in sizes:
        for int8 in (False, True):
            each = 1 + 4 / C if int8 else byte
            yield Case(
                "decode_attention",
                f"{B} x {S} keys, {H} heads of {C}{', int8 cache' if int8 else ''}",
                partial(decode_inputs, B, S, H, C, int8),
                kernels.decode_attention,
                decode_plain,
                {"torch": decode_sdpa} | flash_decoding(),
                "read",
                2 * B * S * H * C * each,
                exact=("k_scale", "v_scale"),
                peer_inputs=dequantised,
                tunes=(("decode_attention", "forward"),)
                if (B, int8) == (sizes[-2 if not quick else 0][0], False)
                else (),
            )


def decode_inputs(B: int, S: int, H: int, C: int, int8: bool) -> Inputs:
    found = {"q": normal(B, H, C), "lengths": torch.full((B,), S)}
    for name in ("k", "v"):
        x = normal(B, S, H, C)
        if int8:
            scale = x.abs().amax(-1) / 127
            found[f"{name}_scale"] = scale
            x = (x / scale[..., None]).round().to(torch.int8)
        found[f"{name}_cache"] = x
    return found


def dequantised(inputs: Inputs) -> Inputs:
    """A cache that the peers can read: theirs stays in the floating type."""
    found = {k: v for k, v in inputs.items() if not k.endswith("_scale")}
    for name in ("k", "v"):
        if f"{name}_scale" in inputs:
            wide = inputs[f"{name}_cache"] * inputs[f"{name}_scale"][..., None]
            found[f"{name}_cache"] = wide.to(inputs["q"].dtype)
    return found


def decode_plain(**inputs: Tensor) -> Tensor:
    x = dequantised(inputs)
    q = x["q"][:, None]
    return ops.attention(q, x["k_cache"], x["v_cache"], False, None, x["lengths"])[:, 0]


def decode_sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """All rows are full here, so PyTorch needs no mask: its best case."""
    return ops.sdpa(q[:, None], k_cache, v_cache)[:, 0]


def linears(quick: bool, byte: int) -> Iterator[Case]:
    # Name, outputs, inputs, SwiGLU behind it.
    layers = (
        [("qkv", 96, 256, False), ("gate and up", 128, 256, True)]
        if quick
        else [
            ("qkv", 3 * 4096, 4096, False),
            ("o", 4096, 4096, False),
            ("gate and up", 2 * 11008, 4096, True),
            ("down", 4096, 11008, False),
            ("lm_head", 156_032, 4096, False),
        ]
    )
    for rows in (1, 3) if quick else (1, 8, 32):
        for name, outputs, width, gated in layers:
            for weights, size in (("float", byte), ("int8", 1), ("int4", 0.5 + 2 * byte / 128)):
                tuned = (rows, name) in (
                    {(1, "qkv"), (3, "qkv")} if quick else {(1, "gate and up"), (32, "gate and up")}
                )
                kind = "gemv" if rows == 1 else "linear"
                yield Case(
                    "linear",
                    f"{rows} x {width} to {outputs}, {name}{'' if weights == 'float' else ', '}"
                    f"{weights.replace('float', '')}",
                    partial(linear_inputs, rows, outputs, width, weights),
                    partial(kernels.linear, swiglu=gated),
                    partial(linear_plain, swiglu=gated),
                    {"torch": partial(linear_plain, swiglu=gated)},
                    "read",
                    outputs * width * size,
                    peer_inputs=lambda inputs: {"x": inputs["x"], "weight": widen(**inputs)},
                    tunes=((f"{kind}_{weights}", "forward"),) if tuned else (),
                )


def linear_inputs(rows: int, outputs: int, width: int, weights: str) -> Inputs:
    x = normal(rows, width)
    if weights == "int8":
        codes = torch.randint(-128, 128, (outputs, width), dtype=torch.int8)
        return {"x": x, "weight": codes, "scale": 0.01 + normal(outputs).abs() / 64}
    if weights == "int4":
        pairs = torch.randint(0, 256, (outputs, width // 2), dtype=torch.uint8)
        scale = 0.05 + normal(width // 128, outputs).abs() / 8
        return {"x": x, "weight": pairs, "scale": torch.stack((scale, torch.randn_like(scale)), -1)}
    return {"x": x, "weight": normal(outputs, width) * width**-0.5}


def widen(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The weight that the codes stand for; the layout is that of qwen2audio_kernels/linear.py."""
    if scale is None:
        return weight
    if weight.dtype == torch.int8:
        return (weight * scale[:, None]).to(x.dtype)
    pairs = weight.unflatten(1, (-1, 64))
    codes = torch.cat((pairs & 15, pairs >> 4), -1).to(scale.dtype)  # (outputs, K/128, 128)
    step, zero = (t.T[..., None] for t in scale.unbind(-1))
    return ((codes - 8) * step + zero).flatten(1).to(x.dtype)


def linear_plain(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    y = F.linear(x, widen(x, weight, scale))
    return ops.swiglu(*y.chunk(2, -1)) if swiglu else y


def ends(quick: bool, byte: int) -> Iterator[Case]:
    """What stands before and behind the layers."""
    for seconds in (0.2,) if quick else (3, 30):
        N = round(seconds * frontend.SAMPLE_RATE)
        frames = frontend.clip_lengths(N).input_frames
        yield Case(
            "log_mel",
            f"{seconds} s",
            lambda N=N: {"waveform": 0.1 * normal(N)},
            kernels.log_mel,
            frontend.log_mel,
            {"torch": frontend.log_mel},
            "copy",
            4.0 * (N + 128 * frames),
            graph=False,
            exact=("waveform",),
            check=log_mel_check,
            tunes=(("log_mel", "forward"),) if seconds in (0.2, 30) else (),
        )
    V = 700 if quick else 156_032
    for B in (2,) if quick else (1, 32):
        for greedy in (True, False):
            yield Case(
                "sample",
                f"{B} x {V}, {'greedy' if greedy else 'published settings'}",
                partial(sample_inputs, B, V, greedy),
                kernels.sample,
                lambda greedy=greedy, **inputs: sample_plain(greedy, **ids_read(inputs)),
                {"torch": partial(sample_plain, greedy)},
                "read",
                float(B * V * byte),
                graph=False,
                exact=("uniform", "temperature", "top_p", "penalty"),
                peer_inputs=ids_read,
                check=partial(sample_check, greedy),
                tunes=(("sample", "forward"),) if B > 1 and not greedy else (),
            )
    P, D, V = (5, 64, 300) if quick else (2048, 4096, 156_032)
    product = 2.0 * P * D * V
    yield Case(
        "cross_entropy",
        f"{P} x {D}, {V} words",
        lambda: {
            "x": normal(P, D),
            "weight": normal(V, D) * D**-0.5,
            "labels": torch.randint(0, V, (P,)),
        },
        kernels.cross_entropy,
        ops.cross_entropy,
        {"torch": ops.cross_entropy} | liger("cross_entropy"),
        "matmul",
        product,
        ("x", "weight"),
        3 * product,
        tunes=(("cross_entropy", "forward"),),
    )


def log_mel_check(inputs: Inputs) -> None:
    """Within 2e-5 of float64. The logarithm of one bin near zero power decides the largest error
    of kernel and plain op alike, so which of the two is closer there is chance."""
    ours, exact = kernels.log_mel(**inputs), frontend.log_mel(inputs["waveform"].double())
    error = float((ours - exact).abs().max())
    assert error <= 2e-5, f"log_mel: error {error:.1e}, allowed 2e-5"


def sample_inputs(B: int, V: int, greedy: bool) -> Inputs:
    read = torch.rand(B, V).topk(min(800, V // 8)).indices  # as many ids a row, all different
    return {
        "logits": 3 * normal(B, V),
        "uniform": torch.rand(B),
        "temperature": torch.full((B,), 0.0 if greedy else 0.7),
        "top_k": torch.full((B,), 20, dtype=torch.int32),
        "top_p": torch.full((B,), 0.5),
        "penalty": torch.full((B,), 1.1),
        "seen": torch.zeros(B, V, dtype=torch.bool).scatter(1, read, True),
    }


def ids_read(inputs: Inputs) -> Inputs:
    """The ids that were seen as sampling.py is given them, (B, T), and not as a mark on each."""
    seen = inputs["seen"]
    return {"logits": inputs["logits"], "history": seen.nonzero()[:, 1].view(len(seen), -1)}


def sample_plain(greedy: bool, logits: Tensor, history: Tensor) -> Tensor:
    """The same rules from sampling.py."""
    chosen = sampling.Settings(
        do_sample=not greedy, temperature=0.7, top_k=20, top_p=0.5, repetition_penalty=1.1
    )
    return sampling.choose(logits, history, 1, chosen)


def sample_check(greedy: bool, inputs: Inputs) -> None:
    """The token is the highest; or, drawn, among those that top-k and top-p keep, ties included."""
    token = kernels.sample(**inputs)[:, None]
    scores, penalty = inputs["logits"].float(), inputs["penalty"][:, None]
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores = torch.where(inputs["seen"], penalised, scores)
    if greedy:
        assert token.equal(scores.argmax(-1, keepdim=True)), "sample: not the highest score"
        return
    scores = scores / 0.7
    kept = sampling.keep_top_p(sampling.keep_top_k(scores, 20), 0.5)
    lowest = kept.masked_fill(kept == float("-inf"), float("inf")).amin(-1, keepdim=True)
    assert (scores.gather(1, token) >= lowest).all(), "sample: drew a token that was cut off"


# --- peers that may be installed ----------------------------------------------------------------


def liger(op: str) -> dict[str, Function]:
    """Liger's version of an op, where the package is there."""
    try:
        from liger_kernel.ops import (
            fused_linear_cross_entropy,
            layer_norm,
            rms_norm,
            swiglu,
        )
    except ImportError:
        return {}

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, labels
        )
        return found[0] if isinstance(found, tuple) else found

    functions: dict[str, Function] = {
        "rms_norm": lambda x, weight: rms_norm.LigerRMSNormFunction.apply(
            x, weight, EPS, 0.0, "llama", False
        ),
        "layer_norm": lambda x, weight, bias: layer_norm.LigerLayerNormFunction.apply(
            x, weight, bias, EPS
        ),
        "swiglu": lambda gate, up: swiglu.LigerSiLUMulFunction.apply(gate, up),
        "cross_entropy": loss,
    }
    return {"liger": functions[op]}


def flash_attention(causal: bool) -> dict[str, Function]:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return {}
    return {"flash_attn": partial(flash_attn_func, causal=causal)}


def flash_decoding() -> dict[str, Function]:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return {}

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        return flash_attn_with_kvcache(
            q[:, None], k_cache, v_cache, cache_seqlens=lengths.int(), causal=True
        )[:, 0]

    return {"flash_attn": run}
