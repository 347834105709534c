"""Rotary position embedding of queries and keys, both in one launch; and, where the engine
decodes, the write of keys and values into the cache in the same one.

    first'  = first  * cos - second * sin        channel i is paired with channel i + C/2
    second' = second * cos + first  * sin

Backward is the same kernel turning the other way (the conjugate): a rotation's inverse is its
transpose, so dq = rotate(dq', -angle).

Rounding: float32 inside, rounded once at the end. The plain op rounds each product and the sum to
the activation dtype; the tables are rounded to it before either sees them.

Roofline: bytes. A position of H + G heads of C channels of b bytes reads and writes b (H + G) C
each; its cos and sin are read once per block of heads. The plain version moves about three times
as much.

Layout: a program turns a block of heads of one position, of q or of k. All strides but the
channels' are passed, so views into a fused projection cost nothing, and the tables may repeat over
the batch with stride zero.

Limits: no gradient for cos and sin; unit stride along the channels (other layouts are copied
first); differentiable once. rope_into_cache has no backward. Its int8 codes are those of
ops.quantise, of the key as it is rounded to the activations' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch


@triton.jit
def _turned(
    x_ptr,
    cos_ptr,
    sin_ptr,
    x_stride_head,
    head,
    heads,
    half,
    INVERSE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Both halves of the heads of one position, turned, float32; the pointers stand there."""
    channels = tl.arange(0, BLOCK_HALF)
    inside = channels < half
    cos = tl.load(cos_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    first, second = _halves(x_ptr, x_stride_head, head, heads, half, BLOCK_HALF)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _halves(x_ptr, x_stride_head, head, heads, half, BLOCK_HALF: tl.constexpr):
    """Both halves of some heads as (heads, channels) in float32."""
    channels = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads)[:, None] & (channels < half)
    source = x_ptr + head[:, None] * x_stride_head + channels
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store(first, second, y_ptr, y_stride_head, head, heads, half, BLOCK_HALF: tl.constexpr):
    """Write both halves of some heads, rounded to y's type."""
    channels = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads)[:, None] & (channels < half)
    target = y_ptr + head[:, None] * y_stride_head + channels
    dtype = y_ptr.dtype.element_ty
    tl.store(target, first.to(dtype), mask=mask)
    tl.store(target + half, second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["times"])  # as in attention.py
def rope_kernel(
    q_ptr,  # (B, T, H, C), strided
    k_ptr,  # (B, T, G, C), strided
    cos_ptr,  # (B, T, C/2), strided
    sin_ptr,
    q_out_ptr,  # (B, T, H, C) contiguous
    k_out_ptr,  # (B, T, G, C) contiguous
    q_stride_row,
    q_stride_time,
    q_stride_head,
    k_stride_row,
    k_stride_time,
    k_stride_head,
    cos_stride_row,
    cos_stride_time,
    sin_stride_row,
    sin_stride_time,
    times,
    q_heads,
    k_heads,
    half,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    row, time = position // times, position % times
    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    cos = cos_ptr + row * cos_stride_row + time * cos_stride_time
    sin = sin_ptr + row * sin_stride_row + time * sin_stride_time
    if block < q_blocks:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        x = q_ptr + row * q_stride_row + time * q_stride_time
        first, second = _turned(
            x, cos, sin, q_stride_head, head, q_heads, half, INVERSE, BLOCK_HALF
        )
        y = q_out_ptr + position * q_heads * 2 * half
        _store(first, second, y, 2 * half, head, q_heads, half, BLOCK_HALF)
    else:
        head = (block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        x = k_ptr + row * k_stride_row + time * k_stride_time
        first, second = _turned(
            x, cos, sin, k_stride_head, head, k_heads, half, INVERSE, BLOCK_HALF
        )
        y = k_out_ptr + position * k_heads * 2 * half
        _store(first, second, y, 2 * half, head, k_heads, half, BLOCK_HALF)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    B, T, H, C = q.shape
    G = k.shape[2]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    settings = _launch.settings("rope", _launch.arch(q.device))
    block_heads = settings["BLOCK_HEADS"]
    _launch.launch(
        rope_kernel,
        (B * T, triton.cdiv(H, block_heads) + triton.cdiv(G, block_heads)),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        T,
        H,
        G,
        C // 2,
        INVERSE=inverse,
        BLOCK_HALF=triton.next_power_of_2(C // 2),
        **settings,
    )
    return q_out, k_out


@triton.jit
def _keep(
    first, second, cache_ptr, stride_head, scale_ptr, scale_offset, head, heads, half,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Write some heads at their place in a cache, as they are or as int8 codes with a scale."""
    if scale_ptr is not None:
        top = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        lost = tl.max(((first != first) | (second != second)).to(tl.int32), 1)
        top = tl.where(lost > 0, float("nan"), top)  # a maximum passes over what is not a number
        scale = tl.div_rn(top, 127.0)
        tl.store(scale_ptr + scale_offset + head, scale, mask=head < heads)
        scale = tl.maximum(scale, 1.1754943508222875e-38)[:, None]  # zeros are divided by it too
        # Adding 1.5 * 2^23 leaves no bits for a fraction: to the nearest integer, halves to even.
        first = (tl.div_rn(first, scale) + 12582912.0) - 12582912.0
        second = (tl.div_rn(second, scale) + 12582912.0) - 12582912.0
    _store(first, second, cache_ptr, stride_head, head, heads, half, BLOCK_HALF)


@triton.jit
def rope_into_cache_kernel(
    q_ptr,  # (N, H, C), strided
    k_ptr, v_ptr,  # (N, G, C), strided
    cos_ptr, sin_ptr,  # (N, C/2), strided
    row_ptr, position_ptr,  # (N,)
    q_out_ptr, k_out_ptr,  # (N, H, C), (N, G, C) contiguous
    k_cache_ptr, v_cache_ptr,  # (B, S, G, C), strided
    k_scale_ptr, v_scale_ptr,  # (B, S, G), contiguous along G, or None
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_cos, stride_sin,
    stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    stride_kscale_b, stride_kscale_s, stride_vscale_b, stride_vscale_s,
    q_heads, k_heads, half,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    _launch.begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks, k_blocks = tl.cdiv(q_heads, BLOCK_HEADS), tl.cdiv(k_heads, BLOCK_HEADS)
    row = tl.load(row_ptr + token).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos, sin = cos_ptr + token * stride_cos, sin_ptr + token * stride_sin
    heads = tl.arange(0, BLOCK_HEADS)
    dtype = k_out_ptr.dtype.element_ty
    if block < q_blocks:
        head = block * BLOCK_HEADS + heads
        x = q_ptr + token * stride_q
        first, second = _turned(x, cos, sin, stride_qh, head, q_heads, half, False, BLOCK_HALF)
        y = q_out_ptr + token * q_heads * 2 * half
        _store(first, second, y, 2 * half, head, q_heads, half, BLOCK_HALF)
    elif block < q_blocks + k_blocks:
        head = (block - q_blocks) * BLOCK_HEADS + heads
        x = k_ptr + token * stride_k
        first, second = _turned(x, cos, sin, stride_kh, head, k_heads, half, False, BLOCK_HALF)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        y = k_out_ptr + token * k_heads * 2 * half
        _store(first, second, y, 2 * half, head, k_heads, half, BLOCK_HALF)
        scales = row * stride_kscale_b + position * stride_kscale_s
        place = k_cache_ptr + row * stride_kb + position * stride_ks
        _keep(
            first, second, place, stride_kg, k_scale_ptr, scales, head, k_heads, half, BLOCK_HALF
        )  # fmt: skip
    else:
        head = (block - q_blocks - k_blocks) * BLOCK_HEADS + heads
        first, second = _halves(
            v_ptr + token * stride_v, stride_vh, head, k_heads, half, BLOCK_HALF
        )
        scales = row * stride_vscale_b + position * stride_vscale_s
        place = v_cache_ptr + row * stride_vb + position * stride_vs
        _keep(
            first, second, place, stride_vg, v_scale_ptr, scales, head, k_heads, half, BLOCK_HALF
        )  # fmt: skip


class RopeFunction(torch.autograd.Function):
    """(q, k, cos, sin) -> turned q, turned k."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *_turn(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by an angle that grows with their position.

    Channel i is paired with channel i + C/2 (halves, not neighbours):

        first'  = first  * cos - second * sin
        second' = second * cos + first  * sin

    q        (B, T, H, C)    float32, float16 or bfloat16, any strides
    k        (B, T, G, C)    q's dtype
    cos, sin (B, T, C/2)     q's dtype, from rope_tables; or (1, T, C/2) for every row
    returns  q, k of the same shapes and dtype
    raises   ValueError for other dtypes, shapes or devices, and where cos or sin wants a gradient
    Su et al., arXiv 2104.09864, section 3.4.
    """
    _launch.check_floats("rope", q=q, k=k, cos=cos, sin=sin)
    _launch.check(
        q.dim() == 4 and q.shape[-1] % 2 == 0 and q.shape[-1] > 0,
        "rope",
        f"q has shape {tuple(q.shape)}, expected (batch, time, heads, an even number of channels)",
    )
    B, T, _, C = q.shape
    _launch.check(
        k.dim() == 4 and k.shape[:2] == (B, T) and k.shape[3] == C,
        "rope",
        f"k has shape {tuple(k.shape)}, expected ({B}, {T}, heads, {C}) as q",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        shape = (1 if table.shape[:1] == (1,) else B, T, C // 2)
        _launch.check_shape("rope", name, table, shape, "batch or 1, time, half the channels of q")
        _launch.check(
            not table.requires_grad, "rope", f"{name} wants a gradient; only the plain op gives it"
        )
    return RopeFunction.apply(q, k, cos.expand(B, -1, -1), sin.expand(B, -1, -1))


def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys of N tokens as `rope`, and write keys and values into a cache.

        k_cache[rows, positions] = turned k        v_cache[rows, positions] = v

    q                 (N, H, C)     float32, float16 or bfloat16, any strides
    k, v              (N, G, C)     q's dtype
    cos, sin          (N, C/2)      q's dtype, from rope_tables
    k_cache, v_cache  (B, S, G, C)  changed in place; q's dtype, or int8 with scales. Unit stride
                                    along C
    rows, positions   (N,)          integers, a token's place in the cache. Not checked: the values
                                    are on the device. No two tokens may have one place
    k_scale, v_scale  (B, S, G)     float32, changed in place, with an int8 cache: x = code * scale;
                                    None otherwise
    returns           q, k          turned, of their shapes and dtype
    raises            ValueError for other dtypes, shapes or devices, and where a gradient is asked
                      for
    """
    op = "rope_into_cache"
    _check_into_cache(op, q, k, v, cos, sin, k_cache, v_cache, rows, positions, k_scale, v_scale)
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    (N, H, C), G = q.shape, k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    options = _launch.settings("rope", _launch.arch(q.device))
    blocks = [triton.cdiv(heads, options["BLOCK_HEADS"]) for heads in (H, G, G)]
    no_strides = (0, 0)
    _launch.launch(
        rope_into_cache_kernel, (N, sum(blocks)),
        q, k, v, cos, sin, rows.contiguous(), positions.contiguous(), q_out, k_out,
        k_cache, v_cache, k_scale, v_scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(no_strides if k_scale is None else k_scale.stride()[:2]),
        *(no_strides if v_scale is None else v_scale.stride()[:2]),
        H, G, C // 2, BLOCK_HALF=triton.next_power_of_2(C // 2), **options,
    )  # fmt: skip
    return q_out, k_out


def _check_into_cache(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    tokens = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    _launch.check_floats(op, **tokens)
    axes = "(tokens, heads, an even number of channels)"
    _launch.check(
        q.ndim == 3 and q.shape[-1] % 2 == 0 and q.shape[-1] > 0,
        op,
        f"q has shape {tuple(q.shape)}, expected {axes}",
    )
    N, _, C = q.shape
    _launch.check(
        k.ndim == 3 and k.shape[::2] == (N, C),
        op,
        f"k has shape {tuple(k.shape)}, expected ({N}, heads, {C}) as q",
    )
    G = k.shape[1]
    _launch.check_shape(op, "v", v, (N, G, C), "the shape of k")
    for name, table in (("cos", cos), ("sin", sin)):
        _launch.check_shape(op, name, table, (N, C // 2), "tokens, half the channels of q")
    _launch.check(
        k_cache.ndim == 4 and k_cache.shape[2:] == (G, C),
        op,
        f"k_cache has shape {tuple(k_cache.shape)}, expected (rows, positions, {G}, {C}) as k",
    )
    _launch.check_shape(op, "v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tokens.values())
    _launch.check(not gradient, op, "has no backward; call it under torch.no_grad()")
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    given = {name: x for name, x in scales.items() if x is not None}
    for name, cache in caches.items():
        dtype = f"{name} is {cache.dtype}, expected {q.dtype} or, with scales, torch.int8"
        _launch.check(cache.dtype == (torch.int8 if given else q.dtype), op, dtype)
        _launch.check(cache.stride(-1) == 1, op, f"{name} has no unit stride along its channels")
    if given:
        _launch.check_scales(op, tuple(k_cache.shape[:3]), **scales)
    for name, scale in given.items():
        _launch.check(scale.stride(-1) == 1, op, f"{name} has no unit stride along the heads")
    integers = {"rows": rows, "positions": positions}
    for name, numbers in integers.items():
        _launch.check_shape(op, name, numbers, (N,), "one a token")
    _launch.check_integers(op, **integers)
    _launch.check_device(op, **tokens, **caches, **given, **integers)
