"""The next turn of a conversation reads what is new, and answers as if it had read everything."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from qwen2audio_core import assistant as assistants
from qwen2audio_core import backends, decoder, ops
from qwen2audio_core.assistant import Latest, load
from qwen2audio_core.packing import pack_codes
from qwen2audio_core.reuse import Fingerprint, Read, shared
from qwen2audio_core.training import lora

pytestmark = pytest.mark.usefixtures("one_thread")

AUDIO = 9


@pytest.fixture
def assistant(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = load("random", device="cpu", dtype=torch.float32)
    made.settings = assistants.change(made.settings, greedy=True, max_new_tokens=6)
    return made


def noise(seed, seconds=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(16000 * seconds), generator=generator) * 0.1, 16000


def from_scratch(talk):
    """The conversation's last answer, worked out without what was kept."""
    return talk.assistant.stream_messages(talk.messages[:-1], system=talk.system).finished()[0]


def test_every_turn_answers_as_from_scratch(assistant):
    talk = assistant.chat()
    known = 0
    turns = [
        ("one", noise(1)),
        ("two", [noise(2, 0.5), noise(3, 0.1)]),
        ("three", None),
        (None, noise(4)),
    ]
    for text, clip in turns:
        reply = talk.say(text, clip)
        whole = from_scratch(talk)
        assert reply.ids == whole.ids
        assert reply.finish_reason == whole.finish_reason
        assert reply.prompt.ids == whole.prompt.ids
        assert whole.reused == 0
        assert reply.reused >= known  # all of the prompt before it
        assert bool(reply.reused) == bool(known)
        known = len(reply.prompt.ids)


def test_sampling_goes_the_same_way(assistant):
    talk = assistant.chat()
    talk.say("one", noise(1))
    drawn = {"temperature": 1.0, "seed": 5, "greedy": False, "repetition_penalty": 1.5}
    reply = talk.say("two", **drawn)
    whole = assistant.stream_messages(talk.messages[:-1], **drawn).finished()[0]
    assert reply.reused
    assert reply.ids == whole.ids


def test_only_what_is_new_is_computed(assistant):
    heard, read = [], []
    model = assistant.model
    encode, decode = model.encode_audio, model.decode
    model.encode_audio = lambda mel, frames: heard.append(len(mel)) or encode(mel, frames)
    model.decode = lambda x, *rest, **more: read.append(x.shape[1]) or decode(x, *rest, **more)
    talk = assistant.chat()
    talk.say("one", [noise(1), noise(2)])
    heard.clear()
    read.clear()
    reply = talk.say("two", noise(3))
    assert heard == [1]
    assert read[0] == len(reply.prompt.ids) - reply.reused
    heard.clear()
    reply = talk.say("three")
    assert not heard
    read.clear()
    for _ in talk.retry():
        pass
    assert read[0] == 1  # the last id's logits, whose answer is forgotten


def test_another_clip_of_the_same_length_is_heard(assistant):
    """The ids of both prompts are the same."""
    latest = Latest()
    replies = []
    for seed in (1, 2, 1):
        prompt = assistant.encode([assistants.user_turn("what?", noise(seed))])
        reply = latest.answer(assistant, prompt).finished()[0]
        replies.append(reply)
        assert reply.ids == assistant.stream_prompts([prompt]).finished()[0].ids
    assert replies[0].prompt.ids == replies[1].prompt.ids
    begin = replies[0].prompt.ids.index(assistant.model.config.audio_token_id)
    assert [reply.reused for reply in replies] == [0, begin, begin]


def test_an_answer_that_was_broken_off(assistant):
    talk = assistant.chat()
    stream = talk.stream("one", noise(1))
    next(iter(stream), None)
    reply = talk.say("two")
    assert reply.reused
    assert reply.ids == from_scratch(talk).ids


def test_a_turn_that_failed_at_once_never_was(assistant, monkeypatch):
    talk = assistant.chat()
    talk.say("one")
    before = list(talk.messages)

    def broken(run):
        raise RuntimeError("a fault")

    for turn in (lambda: talk.stream("two"), talk.retry):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a fault"):
            patch.setattr(assistants.Generation, "step", broken)
            list(turn())
        assert talk.messages == before
    assert talk.say("two").ids == from_scratch(talk).ids


def test_a_turn_that_failed_later_is_kept_as_far_as_it_came(assistant, monkeypatch):
    talk = assistant.chat()
    step = assistants.Generation.step

    def broken(run):
        if run.written == 2:
            raise RuntimeError("a fault")
        return step(run)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a fault"):
        patch.setattr(assistants.Generation, "step", broken)
        talk.say("one")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_turn_is_told_once(assistant):
    talk = assistant.chat()
    turn = talk.stream("one")
    assert list(turn)
    talk.say("two")
    before = list(talk.messages)
    assert list(turn) == []
    assert talk.messages == before


def test_another_system_prompt(assistant):
    talk = assistant.chat("Be brief.")
    talk.say("one", noise(1))
    talk.system = "Sing."
    reply = talk.say("two")
    assert reply.reused < 20
    assert reply.ids == from_scratch(talk).ids


def test_several_answers_and_batches_are_read_whole(assistant):
    prompt = assistant.encode([assistants.user_turn("one")])
    stream = assistant.stream_prompts([prompt])
    stream.finished()
    assert not assistant.stream_prompts([prompt, prompt], after=stream).replies[0].reused
    assert assistant.stream_prompts([prompt], answers=2, after=stream).replies[0].reused
    several = assistant.stream_prompts([prompt], answers=2)
    assert not assistant.stream_prompts([prompt], after=several).replies[0].reused


def test_an_answer_goes_on_beside_the_next_one(assistant):
    """As long as it is not over it keeps its cache; then it gives it to the next."""
    talk = assistant.chat()
    first = talk.stream("one", noise(1))
    pieces = iter(first)
    next(pieces)
    assert talk.say("two", noise(2)).reused
    for _ in pieces:
        pass
    alone = assistant.stream("one", noise(1)).finished()[0]
    assert first.reply.ids == alone.ids


# --- a model that has changed ---------------------------------------------------------------------


def in_place(model):
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def replaced(model):
    layer = model.language_model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def another_op(model):
    model.language_model.model.layers[0].mlp.swiglu_op = lambda gate, up: ops.swiglu(gate, up) * 1.5


def a_hook(model):
    model.audio_tower.layers[0].register_forward_hook(lambda module, args, y: y * 1.5)


def a_forward_of_its_own(model):
    tower = model.audio_tower
    forward = tower.forward
    tower.forward = lambda *args: forward(*args) * 1.5


def an_adapter_turned_off(model):
    for layer in lora.layers(model).values():
        layer.enabled = False


def a_private_number(model):
    model.language_model.model.layers[1].mlp._louder = 1.5


def one_in_a_list(model):
    model.language_model.model.layers[1].mlp.factors[0] = 1.5


def another_layer_twice(model):
    layers = model.language_model.model.layers
    layers[2] = layers[1]


def another_eps(model):
    model.language_model.model.layers[1].input_layernorm.eps = 1.0


class Louder(decoder.MLP):
    def forward(self, x):
        return super().forward(x) * 1.5


def another_class(model):
    model.language_model.model.layers[1].mlp.__class__ = Louder


class Around(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1.5


def another_module(model):
    layer = model.language_model.model.layers[1]
    layer.mlp = Around(layer.mlp)


def a_function_of_the_model(model):
    encode = model.encode_audio
    model.encode_audio = lambda *args: encode(*args) * 1.5


def a_function_of_a_class(model):
    forward = decoder.MLP.forward
    decoder.MLP.forward = lambda self, x: forward(self, x) * 1.5
    return partial(setattr, decoder.MLP, "forward", forward)


def a_hook_of_all(model):
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 1.5 if isinstance(module, decoder.MLP) else y
    )
    return hook.remove


CHANGES = [
    *(in_place, replaced, another_op, a_hook, a_forward_of_its_own, an_adapter_turned_off),
    *(another_eps, another_class, another_module, a_function_of_the_model, a_private_number),
    *(one_in_a_list, another_layer_twice),
    *(a_function_of_a_class, a_hook_of_all),
]
HOOKS = (a_hook, a_hook_of_all)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_nothing_serves_a_model_that_has_changed(assistant, change):
    model = assistant.model
    if change is an_adapter_turned_off:
        lora.add(model, lora.Settings(rank=4))
    layers = model.language_model.model.layers
    layers.append(layers[0])  # the same layer twice
    config = replace(model.config.text, num_hidden_layers=len(layers))
    model.config = replace(model.config, text=config)
    layers[1].mlp.factors = [1.0]
    talk = assistant.chat()
    talk.say("one", noise(1))
    undo = change(model)
    try:
        reply = talk.say("two", logprobs=3)
        assert not reply.reused
        scores = assistant.stream_messages(talk.messages[:-1], logprobs=3).finished()[0].logprobs
        assert reply.logprobs == scores
        # It is what it was at the last turn; but of a hook nobody knows that.
        assert bool(talk.say("three").reused) == (change not in HOOKS)
    finally:
        if undo is not None:
            undo()


def test_what_was_put_back_serves_again(assistant):
    talk = assistant.chat()
    talk.say("one", noise(1))
    with backends.use(assistant.model, attention="eager"):
        assert not assistant.chat().say("one").reused
    assert talk.say("two").reused


def test_what_changed_while_it_was_written(assistant):
    """A hook only around the answer: the answer is read again, as it would be from scratch."""
    talk = assistant.chat()
    turn = talk.stream("one", noise(1))
    hook = assistant.model.language_model.model.layers[0].register_forward_hook(
        lambda module, args, y: y * 1.5
    )
    for _ in turn:
        pass
    hook.remove()
    reply = talk.say("two", logprobs=3)
    assert 0 < reply.reused <= len(turn.reply.prompt.ids)
    whole = assistant.stream_messages(talk.messages[:-1], logprobs=3).finished()[0]
    assert reply.ids == whole.ids
    for mine, its in zip(reply.logprobs, whole.logprobs, strict=True):
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


def test_a_fingerprint_sees_what_is_missing(assistant):
    model = assistant.model
    before = Fingerprint(model)
    assert Fingerprint(model).is_of(before)
    del model.language_model.model.layers[1]
    assert not Fingerprint(model).is_of(before)
    assert not before.is_of(Fingerprint(model))


def test_a_quantised_model_before_and_after_an_engine_put_its_codes_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assistant = load("random", device="cpu", dtype=torch.bfloat16, quantize="int8")
    talk = assistant.chat()
    talk.say("one", max_new_tokens=3)
    pack_codes(assistant.model)
    for text in ("two", "three"):
        reply = talk.say(text, max_new_tokens=3)
        assert reply.ids
    assert reply.reused


# --- memory ---------------------------------------------------------------------------------------


def test_what_is_kept_is_given_back(assistant):
    talk = assistant.chat()
    talk.say("one", noise(1))
    assert talk.latest._kept is not None
    kept = weakref.ref(talk.latest._kept[0].run.cache)
    talk.say("two")
    gc.collect()
    assert kept() is None  # replaced by the next turn's
    kept = weakref.ref(talk.latest._kept[0].run.cache)
    talk.clear()
    gc.collect()
    assert kept() is None


def test_nothing_of_a_model_is_kept(assistant):
    model = assistant.model
    talk = assistant.chat()
    talk.say("one")
    layer = model.language_model.model.layers[0]
    gone = [weakref.ref(layer.mlp.up_proj.weight), weakref.ref(layer.self_attn)]
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.detach().clone())
    layer.self_attn = torch.nn.Identity()
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_an_answer_that_is_over_gives_its_cache_away(assistant):
    talk = assistant.chat()
    talk.say("one")
    cache = talk.latest._kept[0].run.cache
    assert cache.keys.nbytes and cache.length
    stream = talk.latest._kept[0]
    talk.say("two")
    assert cache.keys.nbytes == cache.values.nbytes == cache.length == 0
    prompt = assistant.encode([assistants.user_turn("one")])
    again = assistant.stream_prompts([prompt], after=stream)  # of which nothing is left
    assert again.finished()[0].ids == assistant.stream_prompts([prompt]).finished()[0].ids


def test_without_room_for_both_it_is_read_from_the_beginning(assistant, monkeypatch):
    talk = assistant.chat()
    talk.say("one")
    real = assistants.Generation

    def crowded(*words):
        if words[-1] is not None:  # the earlier run
            raise torch.OutOfMemoryError("no room for both")
        return real(*words)

    monkeypatch.setattr(assistants, "Generation", crowded)
    reply = talk.say("two")
    assert not reply.reused
    assert reply.ids == from_scratch(talk).ids


def test_forgetting_while_another_thread_answers(assistant, monkeypatch):
    latest = Latest()
    prompt = assistant.encode([assistants.user_turn("one")])
    real = assistants.Generation

    def forgotten(*words):
        run = real(*words)
        latest.forget()  # as a page does that is cleared
        return run

    with monkeypatch.context() as patch:
        patch.setattr(assistants, "Generation", forgotten)
        stream = latest.answer(assistant, prompt)
    assert stream.finished()[0].ids
    assert latest._kept is None
    latest.answer(assistant, prompt)
    assert latest._kept is not None


def test_after_a_failure_the_memory_is_free(assistant, monkeypatch):
    talk = assistant.chat()
    talk.say("one")

    def full(*words, **options):
        raise torch.OutOfMemoryError("no memory for both")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(assistants, "Generation", full)
        talk.say("two")
    assert talk.latest._kept is None
    assert talk.say("two").ids == from_scratch(talk).ids


# --- what two conversations share -----------------------------------------------------------------


def read(ids, *clips):
    """Of clips given as (value, frames), padded by 7s to one length."""
    if not clips:
        return Read(ids, None, None)
    mel = torch.full((len(clips), 2, 21), 7.0)
    for i, (value, frames) in enumerate(clips):
        mel[i, :, : 2 * frames + 1] = value
    return Read(ids, mel, torch.tensor([frames for _, frames in clips]))


A, B = (1.0, 4), (2.0, 4)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (read([1, 2, 3]), read([1, 2, 3, 4, 5]), (3, 0)),
        (read([1, 2, 3]), read([1, 2, 4, 4, 5]), (2, 0)),
        (read([1, 2, 3]), read([1, 2, 3]), (2, 0)),  # its last id's logits are wanted
        (read([1, 2, 3]), read([1, 2]), (1, 0)),
        (read([]), read([1, 2]), (0, 0)),
        (read([1, 2]), read([2, 2, 3]), (0, 0)),
        (read([1, AUDIO, AUDIO, 3, 4], A), read([1, AUDIO, AUDIO, 3, 5, 6], A), (4, 1)),
        (read([1, AUDIO, AUDIO, 3, 4], A), read([1, AUDIO, AUDIO, 3, 5, 6], B), (1, 0)),
        # Another length, and so other ids behind it; cut within the clip.
        (read([1, AUDIO, AUDIO, 3], A), read([1, AUDIO, AUDIO, AUDIO, 3, 5], (1.0, 6)), (1, 0)),
        (read([1, AUDIO], A), read([1, AUDIO, AUDIO, 3], A), (1, 0)),
        # The end of a clip is the end of what both have.
        (read([1, AUDIO, AUDIO], A), read([1, AUDIO, AUDIO, 3], A), (3, 1)),
        (read([1, AUDIO, AUDIO, 3], A), read([1, AUDIO, AUDIO], A), (1, 0)),
        # The second of two is another one.
        (
            read([AUDIO, AUDIO, 3, AUDIO, AUDIO, 4, 5], A, A),
            read([AUDIO, AUDIO, 3, AUDIO, AUDIO, 4, 5], A, B),
            (3, 1),
        ),
        # Padding behind a clip is not part of it.
        (read([AUDIO, AUDIO, 3, 5], A), read([AUDIO, AUDIO, 3, AUDIO, 4], A, (3.0, 9)), (3, 1)),
        # A place without a clip: nobody knows what was there.
        (read([AUDIO, AUDIO, 3, 4]), read([AUDIO, AUDIO, 3, 4, 5], A), (0, 0)),
    ],
)  # fmt: skip
def test_what_two_conversations_begin_with(before, now, expected):
    assert shared(before, now, AUDIO) == expected
