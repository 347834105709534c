"""Which part of the sound mattered, and when each word was said, against planted truths.

toy.py gives a model and clips of which it is known where the answer lies. The same is asked of the
bundled model on synthesised speech, where there is one.
"""

import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

from qwen2audio_core import assistant as assistants
from qwen2audio_core import attribution, chat, probe, transcribe, word_times
from qwen2audio_core.attribution import Attribution
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import clip_lengths
from qwen2audio_core.word_times import best_path, split_words

METHODS = (attribution.rollout, attribution.gradient, attribution.occlusion)
SLACK = 0.06  # s, one audio token and a half: what the frontend's windows smear


@pytest.fixture(scope="module")
def heard():
    return toy.heard()


def explained(one, waveform, answer):
    """(batch of prompt and answer, positions of the answer's tokens)."""
    prompt = toy.prompt_of(waveform, one)
    ids = one.tokenizer.encode(answer)
    batch = attribution.answered(prompt, ids, one.model)
    return batch, range(len(prompt.ids), len(prompt.ids) + len(ids))


def hits(method, one, words, seeds):
    """How many of the beeps in so many clips the method points to."""
    found = total = 0
    for seed in seeds:
        waveform, letters, starts = toy.example(words, seed)
        result = method(one.model, *explained(one, waveform, letters))
        for i, start in enumerate(starts):
            total += 1
            found += start - SLACK <= result.peak(i) <= start + toy.WORD + SLACK
    return found, total


def shuffled(one):
    """The model with every weight in another place of its tensor: it has learned nothing."""
    other = assistants.load(one.name, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for target, source in zip(other.model.parameters(), one.model.parameters(), strict=True):
            order = torch.randperm(source.numel(), generator=generator)
            target.copy_(source.flatten()[order].view_as(source))
    return other


def test_the_toy_hears(heard):
    right = 0
    for seed in range(20):
        waveform, letters, _ = toy.example(1 + seed % 3, seed)
        reply = heard.stream_prompts([toy.prompt_of(waveform, heard)]).finished()[0]
        right += reply.text == letters
    assert right >= 19


@pytest.mark.parametrize("method", METHODS)
def test_each_method_points_to_the_beep_in_fifty_clips(heard, method):
    found, total = hits(method, heard, 1, range(50))
    assert total == 50 and found >= 45, found


@pytest.mark.parametrize("method", METHODS)
def test_each_letter_points_to_its_own_beep_among_three(heard, method):
    """Also the control: that a beep strikes a model that has learned nothing is not enough.

    (Attention rollout finds a lone beep in noise even there, 28 of 30: it stands out.)
    """
    found, total = hits(method, heard, 3, range(15))
    assert total == 45 and found >= (26 if method is attribution.rollout else 38), found
    found, total = hits(method, shuffled(heard), 3, range(15))
    assert total == 45 and found <= 18, found  # a guess hits 22 % of the clip


# What each of them is


def test_log_odds():
    logits = torch.tensor([[2.0, 0.0, -1.0], [9.0, 90.0, 0.0]])
    p = logits[0].double().softmax(-1)[1]
    got = attribution.log_odds(logits, torch.tensor([1, 1]))
    assert got[0].item() == pytest.approx(float(p.log() - (1 - p).log()), rel=1e-6)
    assert got[1].item() == pytest.approx(
        81.0, abs=1e-3
    )  # where log(1 - p) of the probability is -inf


def test_the_gradient_adds_up_to_what_the_clip_changed(heard):
    """The weights of many steps sum to the score of the clip less that of silence."""
    waveform, letters, _ = toy.example(2, 0)
    batch, tokens = explained(heard, waveform, letters)
    silent = batch.mel.max() - 2
    scores = []
    for mel in (batch.mel, torch.full_like(batch.mel, silent.item())):
        with torch.no_grad():
            logits = heard.model(batch.ids, mel, batch.conv_frames)
        at = torch.tensor(tokens)
        scores.append(attribution.log_odds(logits[0, at - 1], batch.ids[0, at]))
    maps = attribution.gradient_maps(heard.model, batch, tokens, steps=64)
    torch.testing.assert_close(maps.sum((1, 2, 3)), scores[0] - scores[1], rtol=0.05, atol=0.3)
    lengths = clip_lengths(len(waveform))
    found = attribution.gradient(heard.model, batch, tokens, steps=64).weights
    assert found.shape == (2, lengths.audio_tokens)
    inside = maps[:, 0, :, : 4 * lengths.audio_tokens].sum((1, 2))
    torch.testing.assert_close(found.sum(1), inside)


def test_one_step_is_the_plain_gradient_times_the_input(heard):
    waveform, letters, _ = toy.example(1, 3)
    batch, tokens = explained(heard, waveform, letters)
    mel = batch.mel.clone().requires_grad_(True)
    logits = heard.model(batch.ids, mel, batch.conv_frames)
    score = attribution.log_odds(logits[0, tokens[0] - 1], batch.ids[0, tokens[0]])
    (slope,) = torch.autograd.grad(score, mel)
    expected = slope * (batch.mel - (batch.mel.max() - 2))
    got = attribution.gradient_maps(heard.model, batch, tokens, steps=1)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_occlusion_is_the_fall_of_the_score_where_the_window_lies(heard):
    waveform, letters, _ = toy.example(2, 1)
    batch, tokens = explained(heard, waveform, letters)
    done = []
    found = attribution.occlusion(
        heard.model, batch, tokens, hop=0.2, rows=3, on_progress=lambda *pair: done.append(pair)
    )
    assert done == [(3, 7), (6, 7), (7, 7)]  # 32 audio tokens, windows of 5 side by side
    at = torch.tensor(tokens)

    def score(mel):
        with torch.no_grad():
            logits = heard.model(batch.ids, mel, batch.conv_frames)
        return attribution.log_odds(logits[0, at - 1], batch.ids[0, at])

    hidden = batch.mel.clone()
    hidden[..., 40:60] = batch.mel.max() - 2
    expected = score(batch.mel) - score(hidden)
    for column in range(10, 15):
        torch.testing.assert_close(found.weights[:, column], expected, rtol=1e-3, atol=1e-3)


def test_rollout_is_the_product_of_the_layers(heard):
    waveform, letters, _ = toy.example(2, 2)
    batch, tokens = explained(heard, waveform, letters)
    found = attribution.rollout(heard.model, batch, tokens).weights
    places = (batch.ids[0] == heard.model.config.audio_token_id).nonzero()[:, 0]

    def flow(layers, prefix):
        names = [prefix + "blocks.*.hook_resid_pre", prefix + "blocks.*.hook_attn_out"]
        with torch.no_grad(), probe.attention_maps(heard.model, layers) as maps:
            _, cache = probe.run_with_cache(heard.model, batch, names)
        product = torch.eye(1)
        for i, weights in enumerate(maps.values()):
            x, a = (
                cache[f"{prefix}blocks.{i}.hook_{end}"][0].double().norm(dim=-1) ** 2
                for end in ("resid_pre", "attn_out")
            )
            kept = x / (x + a)
            mixed = (1 - kept)[:, None] * weights[0].double().mean(0) + torch.diag(kept)
            product = mixed if i == 0 else mixed @ product
        return product

    text = flow("language_model.model.layers.*", "")[torch.tensor(tokens) - 1][:, places]
    audio = flow("audio_tower.layers.*", "audio.")
    pooled = audio.view(32, 2, 32, 2).mean(1).sum(-1)
    torch.testing.assert_close(found.double(), text @ pooled, rtol=1e-4, atol=1e-6)
    assert (found.sum(1) <= 1).all() and (found >= 0).all()


def test_two_clips_lie_behind_one_another(heard):
    tokenizer = heard.tokenizer
    first, second = toy.clip("a", [0.3], 0.8, 0), toy.clip("b", [0.4], 1.2, 1)
    text = "<|audio_bos|><|AUDIO|><|audio_eos|><|audio_bos|><|AUDIO|><|audio_eos|>?"
    prompt = chat.encode_raw(text, [first, second], tokenizer, sampling_rate=toy.RATE)
    batch = attribution.answered(prompt, tokenizer.encode("ab"), heard.model)
    tokens = [len(prompt.ids), len(prompt.ids) + 1]
    for method in METHODS:
        assert method(heard.model, batch, tokens).weights.shape == (2, 20 + 30)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_attributed(heard, method):
    waveform, letters, _ = toy.example(1, 0)
    batch, _ = explained(heard, waveform, letters)
    for tokens in ([], [0], [batch.ids.shape[1]]):
        with pytest.raises(InputError, match="tokens to explain are positions 1 to"):
            method(heard.model, batch, tokens)
    silent = chat.Batch(torch.tensor([[1, 2]]), torch.ones(1, 2), None, None)
    with pytest.raises(InputError, match="with at least one clip"):
        method(heard.model, silent, [1])


def test_the_peak_is_the_middle_of_what_weighs_most():
    weights = torch.zeros(2, 50)
    weights[0, 10:15] = 1.0
    weights[1, 3] = 5.0  # one high value alone loses against a neighbourhood
    weights[1, 30:35] = 1.5
    weights[1, 40:45] = -9.0
    found = Attribution(weights)
    assert found.peak(0) == pytest.approx(0.5)
    assert found.peak(1) == pytest.approx(1.3)


# Word times


def test_the_best_path_is_the_best_of_all_paths():
    generator = torch.Generator().manual_seed(0)
    for count, places in ((1, 4), (2, 5), (3, 4), (4, 3), (5, 2)):
        weights = torch.randn(3, count, places, generator=generator)
        spans, sums = best_path(weights)
        for head in range(3):
            best = max(
                (sum(weights[head, k, a].item() for k, a in path), path)
                for path in monotone(count, places)
            )
            assert sums[head].item() == pytest.approx(best[0], abs=1e-5)
            for k in range(count):
                own = [a for row, a in best[1] if row == k]
                assert spans[head, k].tolist() == [own[0], own[-1]]


def monotone(count, places):
    """Every path from (0, 0) to the last cell by steps right, down and both."""

    def walk(path):
        k, a = path[-1]
        if (k, a) == (count - 1, places - 1):
            yield path
        for dk, da in ((0, 1), (1, 0), (1, 1)):
            if k + dk < count and a + da < places:
                yield from walk([*path, (k + dk, a + da)])

    return walk([(0, 0)])


def test_words_of_texts_with_and_without_spaces(heard):
    def split(text):
        ids = heard.tokenizer.encode(text)
        words = split_words(ids, heard.tokenizer)
        spelled = [heard.tokenizer.decode([ids[i] for i in own]).strip() for _, own in words]
        return [word for word, _ in words], spelled

    assert split(" Hello, big  world!")[0] == ["Hello,", "big", "world!"]
    assert split("Hello, world")[1] == ["Hello", "world"]  # a sign says nothing about time
    assert split("l'été") == (["l'été"], ["lété"])
    words, tokens = split("你好 world。")
    assert words == ["你", "好", "world。"] and tokens[0] == "你"
    assert split("") == ([], [])
    for spanish in (["hola", "¿Dónde", "está?"], ["Sí", "¡y", "ya!"], ["uno", "(dos", "tres)"]):
        assert split(" ".join(spanish))[0] == spanish
    assert split("it costs $5 to #3")[0] == ["it", "costs", "$5", "to", "#3"]
    assert split('said "hello" to')[0] == ["said", '"hello"', "to"]
    assert split("20 % of it, then ...")[0] == ["20 %", "of", "it,", "then ..."]
    assert split("... and so")[0] == ["... and", "so"] and split(" ... ")[0] == ["..."]
    assert split("他说「今天」。")[0] == ["他", "说", "「今", "天」。"]
    assert split("5月 はい")[0] == ["5", "月", "は", "い"]
    assert split("ქართული ენა")[0] == ["ქართული", "ენა"]  # Georgian has spaces


@given(st.lists(st.text("aé…\"'($¿?-%", min_size=1, max_size=4), min_size=1, max_size=6))
def test_words_are_the_text_itself(heard, pieces):
    """Put together again, they are what was written: no sign is lost, no two words are one."""
    words = split_words(heard.tokenizer.encode(" ".join(pieces)), heard.tokenizer)
    assert " ".join(word for word, _ in words) == " ".join(pieces)
    said = [piece for piece in pieces if any(map(str.isalpha, piece))]
    assert len(words) == max(1, len(said))
    assert all(own and own == sorted(set(own)) for _, own in words)


def test_words_share_what_they_were_written_from():
    """Two tokens in one place, two characters in one token: each has its part, and no overlap."""
    path = word_times.Path([0, 3, 3, 5], [3, 3, 5, 5], [])
    spans = word_times._spans(path, [[0], [1], [2, 3], [3]])
    third = 1 / 3
    assert spans == [
        pytest.approx((0, 3 + third)),
        pytest.approx((3 + third, 3 + 2 * third)),
        pytest.approx((3 + 2 * third, 5.75)),
        pytest.approx((5.75, 6)),
    ]


def planted(places, audio, tokens, width, generator):
    """Attention (H, K, A) of which the second head looks at `places`, the others anywhere."""
    weights = torch.rand(4, tokens, audio, generator=generator) ** 4
    for k, place in enumerate(places):
        middle = torch.arange(audio) - place
        weights[1, k] = torch.exp(-((middle / width) ** 2)) + 0.01 * weights[1, k]
    return weights / weights.sum(-1, keepdim=True)


def test_words_stand_where_a_head_looked(heard):
    """The attention of one head is planted, and words are found where it lies: beeps of one length,
    of which the first is written with eight letters, so that an even spread would be wrong."""

    def errors(looks):
        generator = torch.Generator().manual_seed(3)
        found = []
        for seed in range(10):
            waveform, letters, starts = toy.example(3, seed)
            text = f"{letters[0] * 8} {letters[1]} {letters[2]}"
            batch, tokens = explained(heard, waveform, text)
            audio = (batch.ids[0] == heard.model.config.audio_token_id).nonzero()[:, 0]
            middles = [(start + toy.WORD / 2) / 0.04 for start in starts]
            rows = [middles[i] for i in (*[0] * 9, 1, 1, 2)]
            pattern = torch.zeros(1, 4, batch.ids.shape[1], batch.ids.shape[1])
            made = planted(rows, len(audio), len(tokens), 2.0, generator)
            for k, token in enumerate(tokens):
                pattern[0, :, token - 1, audio] = made[:, k] if looks else 1 / len(audio)
            at = [token - 1 for token in tokens]
            with probe.patch(heard.model, "blocks.1.attn.hook_pattern", pattern, positions=at):
                words = word_times.word_times(
                    heard.model,
                    heard.tokenizer,
                    batch,
                    heard.tokenizer.encode(text),
                    waveform,
                    heads=[(1, 1)],
                )
            assert [word.text for word in words] == text.split()
            assert all(a.end <= b.start for a, b in itertools.pairwise(words))
            assert all(0 <= word.probability <= 1 for word in words)
            for word, start in zip(words, starts, strict=True):
                found += [abs(word.start - start), abs(word.end - start - toy.WORD)]
        return torch.tensor(found)

    looking, blind = errors(True), errors(False)
    assert looking.mean() < 0.05 and looking.max() < 0.2
    assert blind.mean() > 0.15  # without it only the even spread is left


def test_chosen_heads_and_what_cannot_be_timed(heard):
    waveform, letters, _ = toy.example(3, 1)
    batch, tokens = explained(heard, waveform, letters)
    path, chances = word_times.align(heard.model, batch, tokens, heads=[(0, 3), (1, 2)])
    assert path.heads == [(0, 3), (1, 2)] and len(path.first) == len(chances) == 3
    assert path.first[0] == 0 and path.last[-1] == 31
    assert all(
        a <= b
        for a, b in itertools.pairwise(
            [x for p in zip(path.first, path.last, strict=True) for x in p]
        )
    )
    with pytest.raises(InputError, match="none of the heads"):
        word_times.align(heard.model, batch, tokens, heads=[(9, 9)])
    with pytest.raises(InputError, match="must be one row that ends in the answer"):
        word_times.word_times(heard.model, heard.tokenizer, batch, [1, 2])
    end = heard.tokenizer.id_of("<|im_end|>")
    whole = attribution.answered(toy.prompt_of(waveform, heard), [end], heard.model)
    assert word_times.word_times(heard.model, heard.tokenizer, whole, [end]) == []


def test_a_transcript_with_word_times(heard):
    """One more run times the words; nothing else of the transcript changes."""
    waveform, letters, starts = toy.example(1, 3)
    source = (waveform.numpy(), toy.RATE)
    # Its own question takes the place of the published prompt.
    plain = transcribe.transcribe(heard, source, prompt="?")
    timed = transcribe.transcribe(heard, source, prompt="?", words=True)
    (segment,) = timed.segments
    assert timed.text == plain.text == letters and plain.segments[0].words is None
    (word,) = segment.words
    assert word.text == letters and abs(word.start - starts[0]) < 0.1
    assert abs(word.end - starts[0] - toy.WORD) < 0.1
    held = json.loads(transcribe.to_json(timed))["segments"][0]
    assert held["words"] == [
        {"word": letters, "start": word.start, "end": word.end, "probability": word.probability}
    ]
    assert "words" not in json.loads(transcribe.to_json(plain))["segments"][0]


# The bundled model, where there is one


def bundled():
    """The small trained model's folder; skips without it."""
    folder = Path(assistants.__file__).parent / "assets" / "tiny"
    folder = Path(os.environ.get("QWEN2AUDIO_SMALL", folder))
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no trained small model: {folder} is not there")
    return assistants.load(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def spoken():
    """(prompt, ids, words with their true times, waveform) of sentences, by espeak-ng."""
    one = bundled()
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    speech = pytest.importorskip("tiny_data.speech")
    rng = random.Random(5)
    voices = [voice for voice in speech.voices("en", "train") if voice.engine == "espeak"][:8]
    made = []
    while len(made) < 50:
        colour = rng.choice(("red", "blue", "green", "white", "black", "yellow"))
        day = rng.choice(("Monday", "Tuesday", "Friday", "Saturday", "Sunday"))
        text = rng.choice(
            (
                f"Do you have a {colour} {rng.choice(('hat', 'chair', 'car', 'book'))}?",
                f"The meeting is on {day} at {rng.choice(('one', 'three', 'seven', 'eight'))}.",
                f"Where is the {colour} {rng.choice(('door', 'window', 'bag', 'house'))}?",
                f"Maria goes to the hotel on {day}.",
            )
        )
        try:
            waveform, times = speech.speak_with_times(text, rng.choice(voices))
        except speech.SpeechError as error:
            pytest.skip(str(error))
        sound = torch.tensor(waveform)
        prompt = chat.encode_raw(RECOGNISE, [sound], one.tokenizer, sampling_rate=toy.RATE)
        ids = one.tokenizer.encode(text)
        if [word for word, _ in split_words(ids, one.tokenizer)] == [word for word, *_ in times]:
            made.append((prompt, ids, times, sound))
    return one, made


RECOGNISE = (
    "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"
)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_small_model_listens_where_the_word_is(spoken, method):
    """In fifty sentences, one word of each: well more than pointing anywhere would hit."""
    one, made = spoken
    found = chance = 0.0
    for number, (prompt, ids, times, sound) in enumerate(made):
        words = split_words(ids, one.tokenizer)
        chosen = number % len(words)
        _, start, end = times[chosen]
        batch = attribution.answered(prompt, ids, one.model)
        first = words[chosen][1][0]
        peak = method(one.model, batch, [len(prompt.ids) + first]).peak(0)
        found += start - SLACK <= peak <= end + SLACK
        chance += min(1.0, (end - start + 2 * SLACK) / (len(sound) / toy.RATE))
    print(f"{method.__name__}: {found:.0f} of {len(made)}, by chance {chance:.1f}")
    assert found >= 2.5 * chance, (found, chance)


@pytest.mark.slow
def test_word_times_of_the_small_model(spoken):
    """Against the synthesiser's own times, of the true text."""
    one, made = spoken
    errors = []
    for prompt, ids, times, sound in made:
        batch = attribution.answered(prompt, ids, one.model)
        words = word_times.word_times(one.model, one.tokenizer, batch, ids, sound)
        assert [word.text for word in words] == [word for word, *_ in times]
        assert all(a.end <= b.start for a, b in itertools.pairwise(words))
        errors += [
            abs(word.start - start) for word, (_, start, _) in zip(words, times, strict=True)
        ]
    errors.sort()
    print(f"median {errors[len(errors) // 2]:.3f} s, mean {sum(errors) / len(errors):.3f} s")
    assert errors[len(errors) // 2] < 0.08
