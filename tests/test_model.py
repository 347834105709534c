"""The model's own promises: batches, the cache, the splice, masks, dtypes, training."""

import copy

import pytest
import torch

from qwen2audio_core import tiny
from qwen2audio_core.cache import KVCache
from qwen2audio_core.errors import PromptError
from qwen2audio_core.frontend import clip_lengths, log_mel
from qwen2audio_core.model import Qwen2Audio, splice

AUDIO = tiny.TINY.audio_token_id


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen2Audio(tiny.TINY).eval()


def clip(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def collate(rows):
    """Rows of (ids with None for a clip, clips) to left-padded ids, mel, conv_frames, mask."""
    filled, clips = [], []
    for ids, waveforms in rows:
        waiting, row = list(waveforms), []
        for token in ids:
            if token is None:
                clips.append(waiting.pop(0))
                row += [AUDIO] * clip_lengths(len(clips[-1])).audio_tokens
            else:
                row.append(token)
        filled.append(row)
    longest = max(map(len, filled))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in filled])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in filled])
    if not clips:
        return ids, None, None, mask
    mels = [log_mel(c) for c in clips]
    mel = torch.zeros(len(mels), 128, max(m.shape[1] for m in mels))
    for row, one in zip(mel, mels, strict=True):
        row[:, : one.shape[1]] = one
    frames = torch.tensor([clip_lengths(len(c)).conv_frames for c in clips])
    return ids, mel, frames, mask


ROWS = [
    ([1, None, 2, 3], [clip(16000, 1)]),
    ([4, 5], []),
    ([1, None, 2, None, 6, 7, 8], [clip(961, 2), clip(32000, 3)]),
    ([9, None, 2], [clip(5001, 4)]),
]


def alone(model, row, **options):
    ids, mel, frames, _ = collate([row])
    with torch.no_grad():
        return model(ids, mel, frames, **options)


def test_a_row_of_a_batch_equals_the_row_alone(model):
    ids, mel, frames, mask = collate(ROWS)
    with torch.no_grad():
        together = model(ids, mel, frames, mask)
    assert together.isfinite().all()
    for i, row in enumerate(ROWS):
        expected = alone(model, row)[0]
        torch.testing.assert_close(together[i, -len(expected) :], expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_does_not_matter(model):
    ids, mel, frames, mask = collate(ROWS)
    other = collate(ROWS[::-1])
    with torch.no_grad():
        forth = model(ids, mel, frames, mask)
        back = model(*other)
    torch.testing.assert_close(forth, back.flip(0), rtol=1e-5, atol=1e-5)


def test_last_only(model):
    ids, mel, frames, mask = collate(ROWS)
    with torch.no_grad():
        full = model(ids, mel, frames, mask)
        last = model(ids, mel, frames, mask, last_only=True)
    assert last.shape == (len(ROWS), 1, tiny.TINY.text.vocab_size)
    torch.testing.assert_close(last, full[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [[1] * 6, [3, 3], [2, 1, 3]])
def test_the_cache_changes_nothing(model, steps):
    ids, mel, frames, mask = collate(ROWS)
    new = torch.tensor([[11, 12, 13, 14, 15, 16]] * len(ROWS))
    with torch.no_grad():
        whole = torch.cat((ids, new), 1)
        ones = torch.ones_like(new)
        expected = model(whole, mel, frames, torch.cat((mask, ones), 1))[:, ids.shape[1] :]
        cache = KVCache(tiny.TINY.text, len(ROWS), whole.shape[1])
        model(ids, mel, frames, mask, cache)
        got = [model(part, cache=cache) for part in new.split(steps, 1)]
    assert cache.length == whole.shape[1]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-5, atol=1e-5)


def test_cache_rows_can_be_selected(model):
    ids, mel, frames, mask = collate(ROWS)
    new = torch.tensor([[11], [12], [13], [14]])
    with torch.no_grad():
        cache = KVCache(tiny.TINY.text, len(ROWS), ids.shape[1] + 3)
        model(ids, mel, frames, mask, cache)
        twin = copy.deepcopy(cache)
        expected = model(new, cache=twin)
        rows = torch.tensor([3, 0, 0])
        cache.select(rows)
        got = model(new[rows], cache=cache)
    torch.testing.assert_close(got, expected[rows], rtol=1e-5, atol=1e-5)


def test_a_full_cache_is_an_error(model):
    cache = KVCache(tiny.TINY.text, 1, 3)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        with pytest.raises(ValueError, match="holds 3 positions, 4 were asked for"):
            model(torch.tensor([[4]]), cache=cache)


def test_a_generated_audio_token_is_an_ordinary_id(model):
    cache = KVCache(tiny.TINY.text, 1, 3)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
        assert model(torch.tensor([[AUDIO]]), cache=cache).isfinite().all()


def test_audio_tokens_behind_a_cache_need_a_clip(model):
    cache = KVCache(tiny.TINY.text, 1, 60)
    sound = clip(16000)
    held = [AUDIO] * clip_lengths(len(sound)).audio_tokens
    mel = log_mel(sound)[None]
    frames = torch.tensor([clip_lengths(len(sound)).conv_frames])
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
        with pytest.raises(PromptError, match="has places for audio, but no clip was given"):
            model(torch.tensor([[3, *held, 4]]), cache=cache)
        assert cache.length == 2  # nothing was read
        got = model(torch.tensor([[3, *held, 4]]), mel, frames, cache=cache)
        expected = model(torch.tensor([[1, 2, 3, *held, 4]]), mel, frames)[:, 2:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- splice ---------------------------------------------------------------------------------------


def places(*rows):
    return torch.tensor([[character == "a" for character in row] for row in rows])


def test_splice_puts_every_row_in_its_place():
    is_audio = places("xaax", "axaa")
    text = torch.zeros(2, 4, 3)
    audio = torch.arange(1, 28).view(3, 3, 3).float()
    result = splice(text, is_audio, audio, torch.tensor([2, 1, 2]))
    assert torch.equal(result[0, 1:3], audio[0, :2])
    assert torch.equal(result[1, 0], audio[1, 0])
    assert torch.equal(result[1, 2:], audio[2, :2])
    assert (result[~is_audio] == 0).all()


@pytest.mark.parametrize(
    "rows, tokens, message",
    [
        (["xaaxaa"], [3, 1], "clip 1 needs 3 audio tokens, the prompt holds 2 for it"),
        (["xaax"], [1, 1], "2 clips .* for 1: the places of two clips touch and count as one"),
        (["xaax"], [2, 1], "2 clips were given, the prompt has places for 1$"),
        (["xaaxa"], [3], "1 clips were given, the prompt has places for 2"),
        (["xxxx"], [2], "1 clips were given, the prompt has places for 0"),
        (["xxaa", "aaxx"], [4], "1 clips were given, the prompt has places for 2"),
    ],
)
def test_splice_checks_every_run(rows, tokens, message):
    """The reference compares the total alone: two clips with 3 and 1 tokens pass as 2 and 2."""
    is_audio = places(*rows)
    audio = torch.ones(len(tokens), 4, 3)
    with pytest.raises(PromptError, match=message):
        splice(torch.zeros(*is_audio.shape, 3), is_audio, audio, torch.tensor(tokens))


def test_audio_tokens_without_a_clip(model):
    with pytest.raises(PromptError, match="has places for audio, but no clip was given"):
        model(torch.tensor([[1, AUDIO, AUDIO, 2]]))


# --- masks, dtypes, training ----------------------------------------------------------------------


def test_a_mask_of_the_other_sense_is_an_error(model):
    """True for padding, or minus infinity there, as other interfaces have it."""
    ids, mel, frames, mask = collate(ROWS)
    for wrong in (mask == 0, torch.where(mask > 0, 0.0, -float("inf")), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="1 is a token, 0 is padding"):
            model(ids, mel, frames, wrong)


def test_a_mask_with_a_hole_is_an_error(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="has a hole"):
        model(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask is \\(1, 3\\), the ids are \\(1, 4\\)"):
        model(ids, attention_mask=torch.ones(1, 3))


def test_right_padding_where_the_last_position_is_read_on(model):
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        assert model(ids, attention_mask=mask).isfinite().all()
        with pytest.raises(ValueError, match=r"with last_only .* pad at the left"):
            model(ids, attention_mask=mask, last_only=True)
        cache = KVCache(tiny.TINY.text, 2, 4)
        with pytest.raises(ValueError, match=r"with a cache .* pad at the left"):
            model(ids, attention_mask=mask, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(model, dtype):
    ids, mel, frames, mask = collate(ROWS)
    other = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected = model(ids, mel, frames, mask)
        logits = other(ids, mel, frames, mask)
    assert logits.dtype == dtype
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    real = mask.bool()
    error = (logits[real].float() - expected[real]).abs().max() / expected[real].abs().max()
    assert error < 20 * step


def test_half_precision_overflow_is_clamped_as_published():
    from qwen2audio_core.encoder import EncoderLayer

    layer = EncoderLayer(tiny.TINY.audio).half()
    with torch.no_grad():
        layer.fc2.bias.fill_(65000.0)
        y = layer(torch.zeros(1, 4, 64, dtype=torch.float16), None)
    assert y.max().item() == 64512 - 8 or y.max().item() == torch.tensor(64504.0).half().item()
    with torch.no_grad():
        assert layer.float()(torch.zeros(1, 4, 64), None).max() > 64600


def test_every_weight_but_the_positions_gets_a_gradient():
    torch.manual_seed(0)
    model = Qwen2Audio(tiny.TINY)
    ids, mel, frames, mask = collate(ROWS)
    model(ids, mel, frames, mask).square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"audio_tower.embed_positions.weight"}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [5, 1])
def test_it_compiles_without_a_break(model, count, dtype):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run on this Python")
    decoder = copy.deepcopy(model.language_model.model).to(dtype)
    x, positions = torch.randn(1, count, 64, dtype=dtype), torch.arange(count)[None]
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, positions), decoder(x, positions))
