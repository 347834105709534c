"""Rotary position embedding of queries and keys, both in one launch.

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
first); differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch


@triton.jit
def _rotate(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    x_stride_head,
    first_head,
    heads,
    half,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Turn BLOCK_HEADS heads of one position; the pointers stand at that position."""
    channels = tl.arange(0, BLOCK_HALF)
    inside = channels < half
    cos = tl.load(cos_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    head = (first_head + tl.arange(0, BLOCK_HEADS))[:, None]
    mask = (head < heads) & inside[None, :]
    source = x_ptr + head * x_stride_head + channels[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = y_ptr + head * (2 * half) + channels[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + half, (second * cos + first * sin).to(dtype), mask=mask)


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
        _rotate(
            q_ptr + row * q_stride_row + time * q_stride_time,
            q_out_ptr + position * q_heads * 2 * half,
            cos,
            sin,
            q_stride_head,
            block * BLOCK_HEADS,
            q_heads,
            half,
            INVERSE,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    else:
        _rotate(
            k_ptr + row * k_stride_row + time * k_stride_time,
            k_out_ptr + position * k_heads * 2 * half,
            cos,
            sin,
            k_stride_head,
            (block - q_blocks) * BLOCK_HEADS,
            k_heads,
            half,
            INVERSE,
            BLOCK_HEADS,
            BLOCK_HALF,
        )


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
