"""Generating: stopping, several answers, streaming text, stop strings, the small interface."""

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from qwen2audio_core import chat, tiny
from qwen2audio_core.assistant import Assistant, StopWriter, change, load, user_turn
from qwen2audio_core.errors import AudioError, CheckpointError, InputError, Notice, PromptError
from qwen2audio_core.generate import TOGETHER, Generation, generate, likelihoods
from qwen2audio_core.sampling import Settings


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield load("random", device="cpu")
    patch.undo()


def noise(seed=0, seconds=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(16000 * seconds), generator=generator) * 0.1, 16000


def batch_of(assistant, *questions):
    prompts = [assistant.encode([user_turn(q, noise(i))]) for i, q in enumerate(questions)]
    return chat.collate(prompts, assistant.settings.pad_token_id)


def test_length_and_reason(assistant):
    settings = Settings(max_new_tokens=5, eos_token_ids=())
    (answer,) = generate(assistant.model, batch_of(assistant, "a"), settings)
    assert len(answer.ids) == 5 and answer.finish_reason == "length"


def test_a_row_stops_at_its_end_token_and_the_others_go_on(assistant):
    batch = batch_of(assistant, "a", "something longer", "c")
    free = Settings(max_new_tokens=12, eos_token_ids=())
    rows = [answer.ids for answer in generate(assistant.model, batch, free)]
    end = rows[1][3]
    first = [row.index(end) if end in row else None for row in rows]
    settings = Settings(max_new_tokens=12, eos_token_ids=(end,), pad_token_id=end)
    for row, stop, answer in zip(
        rows, first, generate(assistant.model, batch, settings), strict=True
    ):
        assert answer.ids == (row if stop is None else row[: stop + 1])
        assert answer.finish_reason == ("length" if stop is None else "stop")


def test_log_probabilities_are_those_of_the_whole_text_read_at_once(assistant):
    """Whatever drew the ids: penalty, temperature and cuts leave them as the model gave them."""
    settings = Settings(
        max_new_tokens=6, eos_token_ids=(), do_sample=True, temperature=3.0, repetition_penalty=1.5
    )
    prompt = assistant.encode([user_turn("a", noise())])
    batch = chat.collate([prompt], 0)
    (answer,) = Generation(assistant.model, batch, settings, seed=1, logprobs=3).answers
    assert answer.logprobs == []
    run = Generation(assistant.model, batch, settings, answers=2, seed=1, logprobs=3)
    while run.running:
        run.step()
        assert all(len(answer.logprobs) == len(answer.ids) for answer in run.answers)
    for answer in run.answers:
        with torch.inference_mode():
            ids = torch.tensor([prompt.ids + answer.ids[:-1]])
            logits = assistant.model(ids, batch.mel, batch.conv_frames)[0, len(prompt.ids) - 1 :]
        expected = logits.log_softmax(-1)
        for row, token, found in zip(expected, answer.ids, answer.logprobs, strict=True):
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(3)
            assert [i for i, _ in found.top] == best.indices.tolist()
            assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    with pytest.raises(InputError, match="logprobs is -1"):
        Generation(assistant.model, batch, settings, logprobs=-1)
    reply = assistant.stream_prompts([prompt], max_new_tokens=4, logprobs=0).finished()[0]
    assert len(reply.logprobs) == len(reply.ids) == 4 and reply.logprobs[0].top == []


def test_answers_that_it_did_not_write_are_weighed(assistant):
    """As the whole text read at once gives them; also of one token, and more than go together."""
    prompt = assistant.encode([user_turn("a", noise())])
    batch = chat.collate([prompt], 0)
    texts = ["A dog.", "x", "A dog is barking in the yard<|im_end|>", "猫"] * 3
    found = assistant.score(prompt, texts)
    assert len(found) == 12
    assert [pytest.approx(one, abs=1e-4) for one in found[:4]] == found[4:8]
    many = assistant.score(prompt, ["A dog is barking in the yard."] * 20)
    assert sum(map(len, many)) > 2 * TOGETHER and len(many) == 20
    for text, weights in zip(texts[:4], found, strict=False):
        ids = assistant.tokenizer.encode(text, special=True)
        with torch.inference_mode():
            whole = torch.tensor([prompt.ids + ids])
            logits = assistant.model(whole, batch.mel, batch.conv_frames)[0, len(prompt.ids) - 1 :]
        expected = logits[:-1].log_softmax(-1)[range(len(ids)), ids]
        assert weights == pytest.approx(expected.tolist(), abs=1e-4)
        assert assistant.score(prompt, [ids]) == [pytest.approx(weights, abs=1e-5)]
    (reply,) = assistant.stream_prompts([prompt], max_new_tokens=4, logprobs=0).finished()
    written = [likelihood.logprob for likelihood in reply.logprobs]
    assert assistant.score(prompt, [reply.ids]) == [pytest.approx(written, abs=1e-4)]
    raw = assistant.encode_raw("Say:")
    assert len(assistant.score(raw, ["no clip"])[0]) == len(assistant.tokenizer.encode("no clip"))
    assert assistant.score(prompt, []) == []
    with pytest.raises(InputError, match=r"answers\[1\] is empty"):
        assistant.score(prompt, ["a", ""])
    with pytest.raises(InputError, match=r"answers\[1\] has 8192 tokens, .* context holds: 8192"):
        assistant.score(prompt, ["a", [1] * 8192])
    with pytest.raises(InputError, match="give a list of them"):
        assistant.score(prompt, "a bell")
    for wrong in (99_999_999, -1, 1.5):
        with pytest.raises(InputError, match=r"an id of answers\[0\] is "):
            assistant.score(prompt, [[1, wrong]])
    broken = assistant.model.language_model.lm_head
    hook = broken.register_forward_hook(lambda *words: words[-1] * float("nan"))
    try:
        with pytest.raises(CheckpointError, match="not finite"):
            assistant.score(prompt, ["a"])
    finally:
        hook.remove()
    with pytest.raises(InputError, match="this batch has 2"):
        likelihoods(assistant.model, chat.collate([prompt] * 2, 0), [[1]])


def test_the_prompt_does_not_count_and_the_context_does(assistant):
    batch = batch_of(assistant, "x" * 100)
    settings = Settings(max_new_tokens=3, eos_token_ids=())
    assert len(generate(assistant.model, batch, settings)[0].ids) == 3
    limit = tiny.TINY.text.max_position_embeddings
    ids = torch.ones(1, limit - 2, dtype=torch.long)
    near = chat.Batch(ids, torch.ones_like(ids), None, None)
    (answer,) = generate(assistant.model, near, Settings(max_new_tokens=50, eos_token_ids=()))
    assert len(answer.ids) == 2 and answer.finish_reason == "length"
    full = chat.Batch(torch.ones(1, limit).long(), torch.ones(1, limit).long(), None, None)
    with pytest.raises(InputError, match=f"{limit} tokens, and the model's context holds {limit}"):
        generate(assistant.model, full, settings)


def test_a_callback_sees_every_token_and_can_stop(assistant):
    seen = []

    def watch(row, token):
        seen.append((row, token))
        return row == 0 and len([r for r, _ in seen if r == 0]) == 2

    settings = Settings(max_new_tokens=6, eos_token_ids=())
    answers = generate(assistant.model, batch_of(assistant, "a", "b"), settings, on_token=watch)
    assert [len(a.ids) for a in answers] == [2, 6]
    assert [a.finish_reason for a in answers] == ["stop", "length"]
    for row, answer in enumerate(answers):
        assert [token for r, token in seen if r == row] == answer.ids


def test_several_answers_read_the_prompt_once(assistant, monkeypatch):
    calls = []
    encode = assistant.model.encode_audio
    monkeypatch.setattr(
        assistant.model, "encode_audio", lambda *a: calls.append(len(a[0])) or encode(*a)
    )
    settings = Settings(max_new_tokens=8, do_sample=True, temperature=3.0, eos_token_ids=())
    batch = batch_of(assistant, "a", "b")
    answers = generate(assistant.model, batch, settings, answers=4, seed=1)
    assert calls == [2] and len(answers) == 8
    assert len({tuple(a.ids) for a in answers}) > 4
    again = generate(assistant.model, batch, settings, answers=4, seed=1)
    assert [a.ids for a in again] == [a.ids for a in answers]
    with pytest.raises(InputError, match="answers is 0"):
        generate(assistant.model, batch, settings, answers=0)


def test_no_forward_pass_for_a_token_nobody_reads(assistant, monkeypatch):
    calls = []
    decode = assistant.model.decode
    monkeypatch.setattr(
        assistant.model, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k)
    )
    run = Generation(
        assistant.model,
        batch_of(assistant, "a"),
        Settings(max_new_tokens=4, eos_token_ids=()),
    )
    while run.running:
        run.step()
    assert len(calls) == 4  # the prompt and three tokens
    assert run.cache.length == run.cache.capacity
    assert all(seconds > 0 for seconds in run.seconds.values())


# --- text -----------------------------------------------------------------------------------------


def written(tokenizer, text, stop):
    """What a StopWriter lets through, piece by piece, and whether it stopped."""
    writer = StopWriter(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text):
        if writer.stopped:
            break
        pieces.append(writer.push(token))
    return [*pieces, writer.finish()], writer.stopped


@pytest.mark.parametrize(
    "text, stop, expected, stopped",
    [
        ("hello world", [], "hello world", False),
        ("hello world", ["wor"], "hello ", True),
        ("hello world", ["xyz", "lo w"], "hel", True),
        ("aab", ["ab"], "a", True),
        ("aaab", ["aab"], "a", True),
        ("stop at the en", ["end"], "stop at the en", False),
        ("你好，世界", ["世"], "你好，", True),
        ("🎧🎶 ok", ["🎶"], "🎧", True),
        ("x", ["x"], "", True),
        ("one two", ["two", "one"], "", True),
    ],
)
def test_stop_strings(assistant, text, stop, expected, stopped):
    pieces, did_stop = written(assistant.tokenizer, text, stop)
    assert ("".join(pieces), did_stop) == (expected, stopped)


def test_only_what_might_be_a_stop_is_held_back(assistant):
    pieces, _ = written(assistant.tokenizer, "abcabd", ["abd"])
    assert pieces == ["", "", "abc", "", "", "", ""]


def test_the_reach_of_a_text_counts_what_is_held_back(assistant):
    writer = StopWriter(assistant.tokenizer, "stop")
    shown, reaches = "", []
    for token in assistant.tokenizer.encode("a sto b stop c"):
        shown += writer.push(token)
        reaches.append(writer.reach)
        assert reaches[-1] >= len(shown)
        if writer.stopped:
            break
    shown += writer.finish()
    assert shown == "a sto b " and reaches == [*range(1, 12), 8] and writer.reach == 8


def test_streamed_text_is_the_text_of_the_ids(assistant):
    stream = assistant.stream("Hello", noise(), temperature=5.0, seed=3, max_new_tokens=60)
    pieces = list(stream)
    reply = stream.reply
    assert "".join(pieces) == reply.text == assistant.tokenizer.decode(reply.ids)
    assert "�" not in "".join(pieces[:-1]) or "�" in reply.text
    assert reply.finish_reason in ("stop", "length")
    assert str(reply) == reply.text


def test_stop_string_ends_an_answer(assistant):
    options = {"temperature": 3.0, "seed": 5, "max_new_tokens": 60}
    whole = assistant.ask("Hello", noise(), **options).text
    middle = whole[len(whole) // 2 :][:2]
    reply = assistant.ask("Hello", noise(), stop=[middle], **options)
    assert reply.text == whole[: whole.index(middle)]
    assert reply.finish_reason == "stop"
    last = assistant.ask(
        "Hello", noise(), stop=[middle], **options | {"max_new_tokens": len(reply.ids)}
    )
    assert (last.text, last.ids, last.finish_reason) == (reply.text, reply.ids, "stop")


# --- the small interface --------------------------------------------------------------------------


def test_a_batch_equals_its_rows(assistant):
    conversations = [
        [user_turn("One", noise(1))],
        [user_turn("A longer question about two clips", [noise(2, 0.3), noise(3, 2.1)])],
        [user_turn("No clip")],
    ]
    options = {"greedy": True, "max_new_tokens": 16}
    together = assistant.batch(conversations, **options)
    for conversation, (reply,) in zip(conversations, together, strict=True):
        (alone,) = assistant.stream_messages(conversation, **options).finished()
        assert reply.ids == alone.ids and reply.text == alone.text
    assert assistant.batch([]) == []
    with pytest.warns(Notice, match="writes the same answer 2 times"):
        twice = assistant.batch(conversations, answers=2, **options)
    assert [[r.ids for r in row] for row in twice] == [[row[0].ids] * 2 for row in together]


def test_a_conversation_is_remembered(assistant):
    talk = assistant.chat()
    first = talk.say("One", noise(1), greedy=True, max_new_tokens=8)
    second = talk.say("Two", greedy=True, max_new_tokens=8)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert second.prompt.ids[: len(first.prompt.ids)] == first.prompt.ids
    assert second.prompt.audio_tokens == first.prompt.audio_tokens
    again = list(talk.retry(temperature=4.0, seed=9, max_new_tokens=8))
    assert len(talk.messages) == 4 and talk.messages[-1]["content"] == "".join(again)
    talk.clear()
    assert talk.messages == []
    with pytest.raises(InputError, match="no turn to try again"):
        talk.retry()


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(assistant):
    talk = assistant.chat()
    turn = iter(talk.stream("One", temperature=3.0, seed=1, max_new_tokens=50))
    piece = next(turn)
    turn.close()
    assert talk.messages[-1] == {"role": "assistant", "content": piece}


def test_a_turn_that_cannot_be_read_costs_nothing(assistant):
    talk = assistant.chat()
    talk.say("One", max_new_tokens=2)
    with pytest.raises(InputError):
        talk.say("Two", "no-such-file.wav")
    assert len(talk.messages) == 2
    turn = talk.messages[0]
    with pytest.raises(InputError, match=r"temperature is 0\.0, it must be"):
        talk.retry(temperature=0.0)
    assert talk.messages[0] is turn and len(talk.messages) == 2


def test_system_prompt(assistant):
    ids = assistant.encode([user_turn("x")], system="Be brief.").ids
    assert "system\nBe brief." in assistant.tokenizer.decode(ids)


def test_one_of_many_that_cannot_be_read_is_named(assistant):
    turn, short = user_turn("What?", noise()), (np.zeros(100, "float32"), 16000)
    for wrong, kind, said in (
        ([user_turn("What?", short)], AudioError, r"messages\[0\]\.content\[0\]: .*too short"),
        ([], PromptError, "no messages"),
        ([user_turn("x" * 9000)], PromptError, "the prompt has"),
    ):
        with pytest.raises(kind, match=r"^conversations\[1\]: " + said) as caught:
            assistant.batch([[turn], wrong, [turn]], max_new_tokens=2)
        assert isinstance(caught.value.__cause__, kind)


def test_an_answer_goes_on_with_what_was_begun(assistant):
    begun = [user_turn("What?", noise()), {"role": "assistant", "content": "A dog"}]
    options = {"greedy": True, "max_new_tokens": 6}
    ((reply,),) = assistant.batch([begun], continue_last=True, **options)
    plain = assistant.encode(begun[:1])
    ids = [*plain.ids, *assistant.tokenizer.encode("A dog")]
    (same,) = assistant.stream_prompts([replace(plain, ids=ids)], **options).finished()
    assert reply.prompt.ids == ids and reply.ids == same.ids
    ((other,),) = assistant.batch([begun], **options)
    assert other.prompt.ids[: len(ids)] == ids and len(other.prompt.ids) > len(ids)
    with pytest.raises(PromptError, match="the last turn is the user's"):
        assistant.encode(begun[:1], continue_last=True)


def test_raw_prompt(assistant):
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
    reply = assistant.complete(text, noise(), greedy=True, max_new_tokens=3)
    assert len(reply.ids) <= 3 and reply.prompt.audio_tokens == [25]
    with pytest.raises(PromptError):
        assistant.complete(text)


def test_options():
    base = Settings(do_sample=True, temperature=0.7, top_k=20, top_p=0.5, repetition_penalty=1.1)
    assert change(base) == base
    assert change(base, temperature=None) == base
    assert change(base, greedy=True).do_sample is False
    assert change(base, greedy=True).repetition_penalty == 1.1
    assert change(Settings(), temperature=0.5).do_sample is True
    with pytest.raises(InputError, match="unknown option 'temprature'"):
        change(base, temprature=1)
    with pytest.raises(InputError, match="leave out top_k"):
        change(base, greedy=True, top_k=5)
    with pytest.raises(InputError, match="nothing was asked"):
        user_turn(None, [])


def test_a_clip_that_is_split_or_cut_is_told_of(assistant):
    """To who gives no function for it, by Python's warnings."""
    options = {"greedy": True, "max_new_tokens": 1}
    told = []
    assistant.ask("What?", noise(1, 31.0), notice=told.append, **options)
    assert len(told) == 1 and "split into 2 pieces" in told[0]
    with pytest.warns(UserWarning, match="split into 2 pieces"):
        assistant.ask("What?", noise(1, 31.0), **options)
    with pytest.warns(UserWarning, match="only its first 30 s are used"):
        raw = "<|audio_bos|><|AUDIO|><|audio_eos|>What?"
        assistant.complete(raw, noise(1, 31.0), long="cut", **options)
    with warnings.catch_warnings(record=True) as told:
        assistant.ask("What?", noise(1, 31.0), **options)
    assert [one.filename for one in told] == [__file__]  # and not a line of the package


def test_each_of_several_notices_is_told():
    """Python would tell of one line of code once, where the texts are the same."""
    code = "import torch\nfrom qwen2audio_core import audio\n"
    code += "for _ in range(3): audio.split(torch.zeros(16000 * 31))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("<string>:3: Notice: clip is 31.0 s long") == 3


def test_the_plain_parts_make_the_same_answer(assistant):
    """What the README shows to people who change the model."""
    messages = [user_turn("What is it?", noise())]
    prompt = chat.encode(messages, assistant.tokenizer)
    batch = chat.collate([prompt], assistant.settings.pad_token_id)
    with torch.no_grad():
        logits = assistant.model(batch.ids, batch.mel, batch.conv_frames)
    assert logits.shape == (1, len(prompt.ids), tiny.TINY.text.vocab_size)
    reply = assistant.ask("What is it?", noise(), greedy=True, repetition_penalty=1.0)
    assert logits[0, -1].argmax().item() == reply.ids[0]
    assert isinstance(assistant, Assistant)


def test_answers_can_be_looked_for(assistant):
    """They hold tensors, which do not compare to one truth: an answer equals itself alone."""
    one, other = (assistant.ask("What is it?", noise(), max_new_tokens=2) for _ in range(2))
    assert [one, other].index(other) == 1 and one.prompt != other.prompt


def test_numbers_of_numpy_are_numbers(assistant):
    ask = partial(assistant.ask, "What is it?", noise(), temperature=1.0)
    plain = ask(seed=5, max_new_tokens=4, top_k=50)
    other = ask(seed=np.int64(5), max_new_tokens=np.int32(4), top_k=np.uint8(50))
    assert plain.ids == other.ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": 5}, "stop is 5"),
        ({"answers": 1.5}, "answers is 1.5, it must be a whole number, at least 1"),
        ({"answers": "2"}, "answers is '2'"),
        ({"logprobs": True}, "logprobs is True, it must be a whole number, 0 to"),
        ({"logprobs": "2"}, "logprobs is '2'"),
        ({"stop": ["a", 5]}, "stop is "),
        ({"audio": ("a.wav", "b.wav")}, "put several into a list"),
        ({"audio": (np.zeros(9), 16000, 1)}, "put several into a list"),
        ({"audio": ()}, "put several into a list"),
    ],
    ids=str,
)
def test_options_of_another_kind_are_one_line(assistant, options, message):
    with pytest.raises(InputError, match=message):
        assistant.ask("What?", **options)


def test_a_dtype_by_name_is_one_line():
    with pytest.raises(InputError, match="dtype is 'float32', it must be one of PyTorch's"):
        load("random", dtype="float32")


def test_no_stop_string(assistant):
    assert assistant.ask("What?", stop=None, max_new_tokens=2).ids
