"""A linear layer for few rows, the shape of decoding: the weight is read once and that is the cost.

    y = x w^T + bias                        then, where asked for,
    y = silu(gate) * up                     gate and up are the two halves of w's rows
    y = y + residual

The weight is in x's dtype or quantised:

    int8   (N, K)    w = code * scale               scale (N,), one an output
    uint8  (N, K/2)  w = (code - 8) * scale + zero  scale (K/128, N, 2): a scale and a zero for 128
           inputs. Byte 64 g + j of a row holds the code of input 128 g + j in its low four bits and
           of input 128 g + 64 + j in its high four, so that either half is contiguous in x.

One row (M = 1): products on the ordinary arithmetic units, a running sum for every column of the
tile, one reduction at the end; no shared memory. More rows: matrix instructions, with the weight as
the side of 64 rows since x has too few. Where the outputs make too few programs for the GPU, K is
split; the parts are stored and added in a fixed order (no atomics). The split depends on the
weight's shape and on the GPU, never on M.

Roofline  bytes: N K b for the weight, b = 4, 2, 1 or 0.53 (int4 with its scales); everything else
          is under 1 % for M <= 64. 2 M N K operations.
Layout    unit stride along K in x and w; y contiguous.
Rounding  products and sums in float32. Among many rows a quantised weight is rounded to x's dtype
          for the matrix instruction (int8 exactly); the epilogue is in float32; y is rounded once.
Limits    no backward. Any M works, but from a few hundred rows on a library's product is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch

GROUP = 128  # inputs that share a scale and zero in int4


@triton.jit
def _multiply(
    x_ptr, w_ptr, scale_zero_ptr, rows, outputs, N, K, first, last, stride_x, stride_w,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over inputs [first, last) of w[outputs] * x[rows], (BLOCK_N, BLOCK_M) float32."""
    if BITS == 4:
        return _multiply_int4(
            x_ptr, w_ptr, scale_zero_ptr, rows, outputs, N, first, last, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K // 128, STAGES,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_K)
    x_ptr += rows[:, None].to(tl.int64) * stride_x + columns[None, :]
    w_ptr += outputs[:, None].to(tl.int64) * stride_w + columns[None, :]
    if BLOCK_M == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        inside = (block + columns < K)[None, :]
        w = tl.load(w_ptr + block, mask=inside, other=0)
        x = tl.load(x_ptr + block, mask=inside, other=0.0)
        if BLOCK_M == 1:
            sums += w.to(tl.float32) * x.to(tl.float32)
        else:
            sums = tl.dot(w.to(x.dtype), tl.trans(x), sums, input_precision="ieee")
    if BLOCK_M == 1:
        return tl.sum(sums, 1)[:, None]
    else:
        return sums


@triton.jit
def _multiply_int4(
    x_ptr, w_ptr, scale_zero_ptr, rows, outputs, N, first, last, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for int4; `first` and `last` are multiples of 128."""
    groups = tl.arange(0, GROUPS)
    if BLOCK_M == 1:  # (outputs, groups, 64), several groups at once
        half = tl.arange(0, 64)[None, None, :]
        x_ptr += rows[:, None, None].to(tl.int64) * stride_x + groups[None, :, None] * 128 + half
        w_ptr += outputs[:, None, None].to(tl.int64) * stride_w + groups[None, :, None] * 64 + half
        scale_zero_ptr += (groups[None, :, None] * N + outputs[:, None, None]) * 2
        groups = groups[None, :, None]
        sums = tl.zeros((BLOCK_N, GROUPS, 64), tl.float32)
    else:  # (outputs, 64), one group
        tl.static_assert(GROUPS == 1)
        half = tl.arange(0, 64)[None, :]
        x_ptr += rows[:, None].to(tl.int64) * stride_x + half
        w_ptr += outputs[:, None].to(tl.int64) * stride_w + half
        scale_zero_ptr += outputs[:, None] * 2
        groups = groups[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(first, last, GROUPS * 128, num_stages=STAGES):
        group = block // 128
        inside = block + groups * 128 < last
        codes = tl.load(w_ptr + group * 64, mask=inside, other=0)
        scale = tl.load(scale_zero_ptr + group * N * 2, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(scale_zero_ptr + group * N * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        x_low = tl.load(x_ptr + block, mask=inside, other=0.0)
        x_high = tl.load(x_ptr + block + 64, mask=inside, other=0.0)
        low = ((codes & 15).to(tl.float32) - 8.0) * scale + zero
        high = ((codes >> 4).to(tl.float32) - 8.0) * scale + zero
        if BLOCK_M == 1:
            sums += low * x_low.to(tl.float32) + high * x_high.to(tl.float32)
        else:
            x_low, x_high = tl.trans(x_low), tl.trans(x_high)
            sums = tl.dot(low.to(x_low.dtype), x_low, sums, input_precision="ieee")
            sums = tl.dot(high.to(x_low.dtype), x_high, sums, input_precision="ieee")
    if BLOCK_M == 1:
        return tl.sum(tl.sum(sums, 2), 1)[:, None]
    else:
        return sums


@triton.jit
def _finish(
    y, up, scale_ptr, bias_ptr, residual_ptr, y_ptr, rows, outputs, M, N, stride_r,
    BITS: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Epilogue on float32 sums (outputs, rows): scale, bias, gate, residual, store."""
    n, m = outputs[:, None], rows[None, :]
    inside = (n < N) & (m < M)
    m = m.to(tl.int64)
    if BITS == 8:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if SWIGLU:
        if BITS == 8:
            up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m * stride_r + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fetch(w_ptr, outputs, first, last, stride_w, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask for a program's first two blocks of the weight to be brought into the GPU's cache.

    It reads no value: this may be done before `begin`, whoever wrote the weight.
    """
    inputs: tl.constexpr = 2 if BITS == 4 else 1  # that one element of w holds
    line: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
    lines: tl.constexpr = max(2 * BLOCK_K // inputs // line, 1)
    columns = tl.minimum(first // inputs + tl.arange(0, lines) * line, last // inputs - 1)
    pointers = w_ptr + outputs[:, None].to(tl.int64) * stride_w + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def linear_fwd_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K), or (2 N, K) where SWIGLU; (.., K/2) for int4
    scale_ptr,  # (N,) or (K/128, N, 2), or None
    bias_ptr,  # (N,) or None
    residual_ptr,  # (M, N) or None
    y_ptr,  # (M, N)
    parts_ptr,  # (splits, M, N) float32, or None where K is not split
    M, N, K, split, stride_x, stride_w, stride_r,
    BITS: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # Programs of the same outputs start together: they share the weight in the cache.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * split
    last = tl.minimum(first + split, K)
    # Beyond the last row and output the last one is computed again, and not stored.
    readable, weights = tl.minimum(rows, M - 1), tl.minimum(outputs, N - 1)
    width = N  # outputs before the gate
    if SWIGLU:
        width = 2 * N
    if OVERLAP:
        _fetch(w_ptr, weights, first, last, stride_w, BITS, BLOCK_K)
        if SWIGLU:
            _fetch(w_ptr, weights + N, first, last, stride_w, BITS, BLOCK_K)
    _launch.begin(OVERLAP)
    y = _multiply(
        x_ptr, w_ptr, scale_ptr, readable, weights, width, K, first, last, stride_x, stride_w,
        BITS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    up = y
    if SWIGLU:
        up = _multiply(
            x_ptr, w_ptr, scale_ptr, readable, weights + N, width, K, first, last,
            stride_x, stride_w, BITS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    if parts_ptr is None:
        _finish(
            y, up, scale_ptr, bias_ptr, residual_ptr, y_ptr, rows, outputs, M, N, stride_r,
            BITS, SWIGLU,
        )  # fmt: skip
    else:
        inside = (outputs < N)[:, None] & (rows < M)[None, :]
        part_row = tl.program_id(2).to(tl.int64) * M + rows[None, :]
        parts_ptr += part_row * width + outputs[:, None]
        tl.store(parts_ptr, y, mask=inside)
        if SWIGLU:
            tl.store(parts_ptr + N, up, mask=inside)


@triton.jit
def linear_reduce_kernel(
    parts_ptr,  # (splits, M, N) float32, twice as wide where SWIGLU
    scale_ptr, bias_ptr, residual_ptr, y_ptr, M, N, stride_r,
    SPLITS: tl.constexpr, BITS: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the parts in their order, then the epilogue."""
    _launch.begin(OVERLAP)
    rows = tl.program_id(0) + tl.arange(0, 1)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = N
    if SWIGLU:
        width = 2 * N
    y = tl.zeros((BLOCK, 1), tl.float32)
    up = tl.zeros((BLOCK, 1), tl.float32)
    for part in tl.static_range(SPLITS):
        part_row = rows[None, :].to(tl.int64) + part * M
        pointers = parts_ptr + part_row * width + outputs[:, None]
        y += tl.load(pointers, mask=outputs[:, None] < N, other=0.0)
        if SWIGLU:
            up += tl.load(pointers + N, mask=outputs[:, None] < N, other=0.0)
    _finish(
        y, up, scale_ptr, bias_ptr, residual_ptr, y_ptr, rows, outputs, M, N, stride_r, BITS, SWIGLU
    )  # fmt: skip


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Linear layer with a plain or quantised weight, optionally gated and added to a residual.

    y = x w^T + bias;   where `swiglu`, y = silu(y[..., :N]) * y[..., N:];   y = y + residual

    x         (..., K)   float32, float16 or bfloat16
    weight    (N, K)     x's dtype, int8, or (N, K/2) uint8 of int4 pairs; twice as many rows
                         where `swiglu`, the gate's first. See the top of this file for the codes.
    bias      one an output, before the gate; x's dtype
    scale     None; (N,) for int8; (K/128, N, 2) for int4, scale and zero. Any of the float dtypes
    residual  (..., N)   x's dtype
    deterministic        True: a row's result is bit for bit the same alone and among any number of
                         rows. Costs the faster way for one row, and larger tiles for many.
    returns   (..., N)   x's dtype, rounded once
    raises    ValueError for other dtypes, shapes or devices, and where a gradient is asked for
    """
    bits = _check(x, weight, bias, scale, residual, swiglu)
    K = x.shape[-1]
    N = len(weight) // 2 if swiglu else len(weight)
    x_rows, weight = _launch.rows(x), _launch.rows(weight)
    bias, scale = (None if t is None else t.contiguous() for t in (bias, scale))
    residual_rows = None if residual is None else _launch.rows(residual)
    M = len(x_rows)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    one = M == 1 and not deterministic
    kind = f"int{bits}" if bits < 16 else "float"
    if x.dtype == torch.float32:
        kind += "_float32"  # no matrix instruction multiplies it
    options = dict(
        _launch.settings(f"{'gemv' if one else 'linear'}_{kind}", _launch.arch(x.device))
    )
    if one:
        options["BLOCK_M"] = 1
    elif not deterministic:
        options["BLOCK_M"] = min(max(triton.next_power_of_2(M), 16), options["BLOCK_M"])
    else:
        options["BLOCK_M"] = 16
    tiles = triton.cdiv(N, options["BLOCK_N"])
    steps = triton.cdiv(K, options["BLOCK_K"])
    wanted = min(triton.cdiv(2 * _launch.processors(x.device), tiles), triton.cdiv(steps, 4), 16)
    split = triton.cdiv(steps, wanted) * options["BLOCK_K"]
    splits = triton.cdiv(K, split)
    parts = None
    if splits > 1:
        parts = torch.empty(splits, M, len(weight), dtype=torch.float32, device=x.device)
    stride_r = 0 if residual_rows is None else residual_rows.stride(0)
    _launch.launch(
        linear_fwd_kernel, (triton.cdiv(M, options["BLOCK_M"]), tiles, splits),
        x_rows, weight, scale, bias, residual_rows, y, parts,
        M, N, K, split, x_rows.stride(0), weight.stride(0), stride_r,
        BITS=bits, SWIGLU=swiglu, **options,
    )  # fmt: skip
    if parts is not None:
        _launch.launch(
            linear_reduce_kernel, (M, triton.cdiv(N, 256)),
            parts, scale, bias, residual_rows, y, M, N, stride_r,
            SPLITS=splits, BITS=bits, SWIGLU=swiglu, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
) -> int:
    """Raise ValueError unless the arguments fit together; returns the bits of a weight."""
    op, K, outputs = "linear", x.shape[-1], len(weight)
    floats = {"x": x, "bias": bias, "residual": residual}
    tensors = {
        k: t for k, t in (floats | {"weight": weight, "scale": scale}).items() if t is not None
    }
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    _launch.check(not gradient, op, "has no backward; call it under torch.no_grad()")
    _launch.check(
        not swiglu or outputs % 2 == 0, op, f"swiglu needs an even number of rows, not {outputs}"
    )
    bits = {torch.int8: 8, torch.uint8: 4}.get(weight.dtype, 8 * weight.dtype.itemsize)
    width, meaning = K, "K of x"
    if bits == 4:
        _launch.check(K % GROUP == 0, op, f"int4 needs K in groups of {GROUP}, x has K = {K}")
        width, meaning = K // 2, "half of x's K"
    elif bits > 8:
        floats["weight"] = weight
    _launch.check_shape(op, "weight", weight, (outputs, width), f"outputs, {meaning}")
    _launch.check_floats(op, **{k: t for k, t in floats.items() if t is not None})
    _launch.check_device(op, **tensors)
    if bias is not None:
        _launch.check_shape(op, "bias", bias, (outputs,), "the rows of weight")
    if residual is not None:
        shape = (*x.shape[:-1], outputs // 2 if swiglu else outputs)
        _launch.check_shape(op, "residual", residual, shape, "the shape of the result")
    _launch.check((scale is not None) == (bits < 16), op, "scale goes with an int8 or int4 weight")
    if scale is not None:
        shape = (outputs,) if bits == 8 else (K // GROUP, outputs, 2)
        _launch.check_shape(op, "scale", scale, shape, "the quantised weight")
        _launch.check_floats(op, scale=scale)
    return bits
