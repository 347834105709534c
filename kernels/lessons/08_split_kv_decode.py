"""Lesson 8: split-KV decoding, and your attention in the model.

While the model writes, there is one query a row and a cache of keys that grows. Lesson 7's kernel
would start 32 programs, one a head, on a GPU with 132 processors, and each would walk the whole
cache alone: 100 processors idle, the others in a queue at the memory. So the keys are split too:

      cache      |<- SPLIT ->|<- SPLIT ->|<- SPLIT ->|<- ...
                      |            |           |
      part kernel  (top, total, acc) of each part, on a program of its own
                      +------------+-----------+
                                   |
      join kernel         y = softmax over all of them

The parts are joined as lesson 6 adds a block to the blocks before it:

    highest = max over parts of top
    weight  = exp(top - highest)                 of each part
    y       = sum(weight * acc) / sum(weight * total)

A part that lies behind a row's last key has none to see. Its top is -inf, so it weighs exp(-inf) =
0, however low the scores of the others are; total and acc are 0.

At 1,024 positions the cache of one conversation is 537 MB over the 32 layers, all of it read for
every token. There are two operations for every number read, so no matrix unit is needed here:
q * k summed over the channels is fast enough.

The size of a part is fixed, not their number. So a part's sums are always made in the same order,
whatever the length of the cache is and the batch around it. (The finished kernel joins the parts in
a fixed order too, one by one, so that no bit of an answer depends on either.)

At the end your two kernels become the model's attention. In this folder you can hear them answer,
in some ten seconds:

    import lesson  # first, as in every lesson
    import torch
    import qwen2audio_core as qa
    from qwen2audio_core import backends

    assistant = qa.load("tiny", "cpu", torch.float32)
    clip = qa.__path__[0] + "/assets/clips/sound_bell.flac"
    with backends.use(assistant.model, attention=lesson.load("08_split_kv_decode").mine):
        print(assistant.ask("What is that sound?", clip))

Run it:  python kernels/lessons/08_split_kv_decode.py
The finished kernel, with an int8 cache: kernels/qwen2audio_kernels/decode_attention.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen2audio_core import backends, ops, tiny
from qwen2audio_core.cache import KVCache
from qwen2audio_core.frontend import clip_lengths, log_mel
from qwen2audio_core.model import Qwen2Audio


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, acc_ptr, top_ptr, total_ptr,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    groups, scale, C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT keys of one head of one row. q (B, H, C), k and v (B, S, G, C), strided."""
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, C)
    start, end = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
    keys = start + part * SPLIT + tl.arange(0, SPLIT)  # counted from the row's first key
    visible = keys < end
    k_ptr += batch * stride_kb + (head // groups) * stride_kg + keys[:, None] * stride_ks
    v_ptr += batch * stride_vb + (head // groups) * stride_vg + keys[:, None] * stride_vs
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + channels)
    k = tl.load(k_ptr + channels[None, :], mask=visible[:, None], other=0.0)
    v = tl.load(v_ptr + channels[None, :], mask=visible[:, None], other=0.0)
    # --- YOUR TURN: seven lines in the place of the next three -------------------------------
    # 1. s:     (SPLIT,) = sum over channels of q * k, times scale
    # 2.        -inf where not visible
    # 3. top:   the maximum of s, -inf in a part without a visible key
    # 4. base:  top, but 0.0 where that is -inf
    # 5. p:     exp(s - base)
    # 6. total: the sum of p
    # 7. acc:   (C,) = sum over keys of p * v
    top = 0.0
    total = 0.0
    acc = tl.zeros((C,), tl.float32)
    # -----------------------------------------------------------------------------------------
    index = (batch * tl.num_programs(0) + head) * tl.num_programs(1) + part
    tl.store(top_ptr + index, top)
    tl.store(total_ptr + index, total)
    tl.store(acc_ptr + index * C + channels, acc)


@triton.jit
def join_kernel(acc_ptr, top_ptr, total_ptr, y_ptr, parts, C: tl.constexpr, PARTS: tl.constexpr):
    """One head of one row: acc (B, H, parts, C), top and total (B, H, parts) to y (B, H, C)."""
    index = tl.program_id(0)
    part = tl.arange(0, PARTS)
    channels = tl.arange(0, C)
    inside = part < parts
    top = tl.load(top_ptr + index * parts + part, mask=inside, other=-float("inf"))
    total = tl.load(total_ptr + index * parts + part, mask=inside, other=0.0)
    places = (index * parts + part[:, None]) * C + channels[None, :]
    acc = tl.load(acc_ptr + places, mask=inside[:, None], other=0.0)
    # --- YOUR TURN, again: two lines in the place of the next one ------------------------------
    # 1. weight: (PARTS,) = exp(top - the highest top)
    # 2. y:      (C,) = sum over parts of weight * acc, divided by the sum of weight * total
    y = tl.zeros((C,), tl.float32)
    # -----------------------------------------------------------------------------------------
    tl.store(y_ptr + index * C + channels, y)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """q (B, H, C) sees the keys start[b] <= j < end[b], at least one, of k, v (B, S, G, C)."""
    assert q.dtype == torch.float32, f"load the model with dtype=torch.float32, not {q.dtype}"
    (B, H, C), (S, G) = q.shape, k.shape[1:3]
    split = 32
    parts = triton.cdiv(S, split)  # whatever the lengths are: a fixed grid
    acc, y = lesson.empty(B, H, parts, C), lesson.empty(B, H, C)
    top, total = lesson.empty(B, H, parts), lesson.empty(B, H, parts)
    part_kernel[(H, parts, B)](
        q, k, v, start, end, acc, top, total, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        H // G, C**-0.5, C=C, SPLIT=split,
    )  # fmt: skip
    join_kernel[(B * H,)](acc, top, total, y, parts, C=C, PARTS=triton.next_power_of_2(parts))
    return y


flash = lesson.load("07_flash_attention")


def mine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """The attention slot's function: lesson 7's kernel for a prompt, this lesson's for a token."""
    if q.shape[1] > 1:
        return flash.attention(q, k, v, causal, key_start, key_end)
    start = torch.zeros(len(q), dtype=torch.long) if key_start is None else key_start
    end = torch.full((len(q),), k.shape[1]) if key_end is None else key_end
    return decode_attention(q[:, 0], k, v, start, end)[:, None]


def answer(model: Qwen2Audio, tokens: int = 5) -> tuple[list[int], Tensor]:
    """Half a second of sound and a few words: the tokens that follow, and all their logits."""
    waveform = torch.sin(torch.arange(8000) * 0.2)
    clip = clip_lengths(len(waveform))
    ids = torch.tensor([[5, *[model.config.audio_token_id] * clip.audio_tokens, 6, 7]])
    cache = KVCache(model.config.text, 1, ids.shape[1] + tokens)
    frames = torch.tensor([clip.conv_frames])
    logits = [model(ids, log_mel(waveform)[None], frames, cache=cache, last_only=True)]
    while len(logits) < tokens:
        logits.append(model(logits[-1].argmax(-1), cache=cache))
    seen = torch.cat(logits, dim=1)[0]  # (tokens, V)
    return seen.argmax(-1).tolist(), seen


def check(solution: bool) -> None:
    if solution:
        lesson.fill(vars(flash), "07_flash_attention")

    def case(
        name: str, S: int, H: int, G: int, end: list[int], hint: str,
        start: int = 0, far: Tensor | None = None,
    ) -> None:  # fmt: skip
        B = len(end)
        q, k, v = torch.randn(B, H, 128), torch.randn(B, S, G, 128), torch.randn(B, S, G, 128)
        if far is not None:  # as in lesson 7
            q[..., 0], k[..., 0] = 128**0.5, far[:, None]
        first, last = torch.full((B,), start), torch.tensor(end)
        want = ops.attention(
            q.double()[:, None], k.double(), v.double(), False, first, last
        ).float()[:, 0]
        limit = 1e-5 if far is None else 1e-4
        lesson.compare(name, decode_attention(q, k, v, first, last), want, hint, limit)

    case(
        "one part: 32 keys",
        *(32, 2, 2, [32]),
        "part: s = tl.sum(q[None, :] * k, axis=1) * scale, acc = tl.sum(p[:, None] * v, axis=0);"
        " join: weight[:, None] * acc, summed over axis 0",
    )
    case(
        "several parts, the last one not full",
        *(150, 2, 1, [150, 140]),
        "in the part, s is -inf where not visible; in the join, acc and total take one weight",
    )
    case(
        "parts without any key, and padding at the left",
        *(150, 1, 1, [60]),
        "exp(-inf - -inf) is NaN: base is 0.0 where top is -inf, which makes total and acc 0",
        start=40,
    )
    case(
        "scores that rise from -200 to 200 with the keys",
        *(150, 1, 1, [150]),
        "exp(200) is infinite: only differences are exponentiated, to top in a part and to the"
        " highest top in the join",
        far=torch.linspace(-200, 200, 150),
    )
    case(
        "parts without any key beside scores around -200",
        *(150, 1, 1, [60]),
        "a part that sees nothing must not be the highest: its top is -inf, and base alone is 0.0",
        far=torch.full((150,), -200.0),
    )
    q, k, v = torch.randn(3, 1, 40, 2, 32)
    want = ops.attention(q.double(), k.double(), v.double(), causal=True).float()
    try:
        lesson.compare("lesson 7's kernel, for the prompt", mine(q, k, v, True), want, "")
    except lesson.NotYet as problem:
        again = "finish it first: python kernels/lessons/07_flash_attention.py"
        raise lesson.NotYet(str(problem), again) from None

    model = Qwen2Audio(tiny.TINY).eval()
    with torch.no_grad():
        tokens, logits = answer(model)
        with backends.use(model, attention=mine) as used:
            my_tokens, my_logits = answer(model)
    lesson.compare(
        "the tiny model with your attention: logits", my_logits, logits, "compare the op's masks"
    )
    assert my_tokens == tokens
    print(f"\n  {used}: the tokens {my_tokens} are the plain model's")


if __name__ == "__main__":
    lesson.main(globals())
