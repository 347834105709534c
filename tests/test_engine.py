"""The engine against its oracle generate.py, and what it promises to many callers at once."""

import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tape
import torch
import torch.nn.functional as F
from tolerance import _compare
from torch import Tensor

from qwen2audio_core import backends, chat, ops, quantize
from qwen2audio_core.assistant import load, user_turn
from qwen2audio_core.engine import Engine
from qwen2audio_core.errors import CheckpointError, InputError, PromptError
from qwen2audio_core.frontend import clip_lengths
from qwen2audio_core.generate import Generation, generate
from qwen2audio_core.packing import pack
from qwen2audio_core.prefix_cache import Beginning, PrefixCache, digest, runs
from qwen2audio_core.recording import record_graph
from qwen2audio_core.sampling import Settings
from qwen2audio_core.slots import Job, SlotCache, Slots

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = Settings(max_new_tokens=12, eos_token_ids=(), repetition_penalty=1.2)
DRAWN = Settings(
    max_new_tokens=12, eos_token_ids=(), do_sample=True, temperature=2.0, top_k=50, top_p=0.9
)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield load("random", device="cpu")
    patch.undo()


def fresh(dtype=torch.float32):
    """A model of its own, to be packed, quantised or broken."""
    return load("random", device="cpu", dtype=dtype).model


def noise(seed, seconds):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(16000 * seconds), generator=generator) * 0.1, 16000


def mixed(assistant, count):
    """Conversations with none to three clips of 0.1 to 2 s, texts and turns of all lengths."""
    draw = random.Random(0)
    prompts = []
    for i in range(count):
        clips = [noise(100 * i + j, draw.uniform(0.1, 2.0)) for j in range(draw.randrange(4))]
        messages = [user_turn("what " * draw.randrange(1, 30), clips)]
        if i % 5 == 4:
            messages += [{"role": "assistant", "content": "ok"}, user_turn("and then?")]
        prompts.append(assistant.encode(messages))
    return prompts


KNOWN = {}


def alone(model, prompt, settings, seed=None):
    """generate.py's answer to one prompt, worked out once."""
    clips = tuple(digest(clip) for clip in prompt.clips)
    key = id(model), tuple(prompt.ids), clips, settings, seed
    if key not in KNOWN:
        batch = chat.collate([prompt], settings.pad_token_id)
        KNOWN[key] = generate(model, batch, settings, seed=seed)[0]
    return KNOWN[key]


def run_to_end(slots, jobs, joins=None):
    """Answer jobs, all from the first step on, or each joining at its step; logits of each."""
    joins = joins or [0] * len(jobs)
    waiting = sorted(range(len(jobs)), key=lambda i: joins[i])
    active, logits, ids = [], {i: [] for i in waiting}, {i: [] for i in waiting}
    step = 0

    def take(row, news):
        ids[active[row]].append(news[0])

    while waiting or active:
        while waiting and joins[waiting[0]] <= step and len(active) < slots.count:
            i = waiting.pop(0)
            job = jobs[i]
            job.row = len(active)
            active.append(i)
            (news,) = slots.prefill([job])
            logits[i].append(slots.logits[0].clone())
            take(job.row, news)
        if active:
            slots.seen_logits = {}
            news = slots.step(len(active))
            for row, one in enumerate(news):
                logits[active[row]].append(slots.seen_logits[row])
                take(row, one)
            for row in reversed(range(len(active))):
                if news[row][1]:
                    if row != len(active) - 1:
                        slots.move(len(active) - 1, row)
                        active[row] = active[-1]
                    active.pop()
                    slots.clear(len(active))
        step += 1
    return [(ids[i], torch.stack(logits[i])) for i in range(len(jobs))]


class Watched(Slots):
    """Slots that keep the logits of each row."""

    seen_logits: dict

    def _append(self, logits, rows):
        if hasattr(self, "seen_logits"):
            for i, row in enumerate(range(rows.start, rows.stop)):
                self.seen_logits[row] = logits[i].clone()
        super()._append(logits, rows)


def job_of(prompt, settings=GREEDY, seed=0):
    return Job(0, prompt.ids, prompt.clips, settings, settings.max_new_tokens, seed)


# --- the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 1, "packed": False},
        {"max_batch": 6, "packed": True},
        {"max_batch": 6, "packed": True, "prefix_bytes": 0},  # prompts are read several at a time
    ],
)
def test_the_same_tokens_as_generate(assistant, options):
    prompts = mixed(assistant, 20)
    expected = [alone(assistant.model, prompt, GREEDY) for prompt in prompts]
    assert len({tuple(answer.ids) for answer in expected}) > 10
    with Engine(fresh(), max_tokens=1024, worker=False, **options) as engine:
        answers = engine.generate(prompts, GREEDY)
    for prompt, ours, theirs in zip(prompts, answers, expected, strict=True):
        assert (ours.ids, ours.finish_reason) == (theirs.ids, theirs.finish_reason), len(prompt.ids)


def test_one_prompt_of_many_that_cannot_fit_is_named(assistant):
    prompts = mixed(assistant, 3)
    with Engine(fresh(), max_batch=2, max_tokens=1024, worker=False) as engine:
        prompts[1] = replace(prompts[1], ids=prompts[1].ids + [1] * 2000)
        with pytest.raises(InputError, match=r"^prompts\[1\]: a prompt of 2\d+ tokens"):
            engine.generate(prompts, GREEDY)
        assert engine.waiting == engine.active == 0  # nobody waits for the others
        assert len(engine.generate(prompts[2:], GREEDY)) == 1


def test_sampled_tokens_are_those_of_generate_and_of_no_neighbour(assistant):
    prompts = mixed(assistant, 6)
    expected = [
        alone(assistant.model, prompt, DRAWN, seed=i).ids for i, prompt in enumerate(prompts)
    ]
    assert alone(assistant.model, prompts[0], DRAWN, seed=99).ids != expected[0]
    with Engine(assistant.model, max_batch=4, max_tokens=1024, worker=False) as engine:
        requests = [engine.submit(prompt, DRAWN, seed=i) for i, prompt in enumerate(prompts)]
        assert [request.result().ids for request in requests] == expected
        assert [request.result().ids for request in requests] == expected  # and can be asked again


def test_ends_budgets_and_least_lengths(assistant):
    prompt = mixed(assistant, 1)[0]
    free = alone(assistant.model, prompt, GREEDY).ids
    end = free[4]
    for settings in (
        Settings(max_new_tokens=12, eos_token_ids=(end,)),
        Settings(max_new_tokens=12, eos_token_ids=(end, free[2]), min_new_tokens=4),
        Settings(max_new_tokens=1, eos_token_ids=()),
    ):
        expected = alone(assistant.model, prompt, settings)
        with Engine(assistant.model, max_batch=2, max_tokens=512, worker=False) as engine:
            request = engine.submit(prompt, settings)
            assert request.result() == expected and request.finish_reason == expected.finish_reason
            assert set(request.seconds) == {"wait", "prefill", "decode"}


def agree(ours, theirs):
    """Two lists of Likelihood, up to the rounding of float32."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=2e-3)


@pytest.mark.parametrize("deterministic", [False, True])
def test_log_probabilities_of_whom_asks_for_them(assistant, deterministic):
    prompts = mixed(assistant, 5)
    wanted = [3, None, 0, 20, None]
    with engine_of(assistant, max_batch=3, deterministic=deterministic) as engine:
        requests = [
            engine.submit(prompt, DRAWN, seed=i, logprobs=top)
            for i, (prompt, top) in enumerate(zip(prompts, wanted, strict=True))
        ]
        for i, (request, top) in enumerate(zip(requests, wanted, strict=True)):
            answer = request.result()
            batch = chat.collate([prompts[i]], 0)
            run = Generation(assistant.model, batch, DRAWN, seed=i, logprobs=top)
            while run.running:
                run.step()
            assert answer.ids == run.answers[0].ids
            if top is None:
                assert answer.logprobs == []
            else:
                agree(answer.logprobs, run.answers[0].logprobs)
        for top in (-1, 21):
            with pytest.raises(InputError, match=f"logprobs is {top}"):
                engine.submit(prompts[0], DRAWN, logprobs=top)


def test_logits_in_bfloat16_are_as_close_as_generates(assistant):
    """Every step's logits on the same ids, by the three-way rule."""
    prompts = mixed(assistant, 4)
    rough = fresh(torch.bfloat16)
    exact = fresh().double()
    exact.load_state_dict(rough.state_dict())
    with torch.inference_mode():
        slots = Watched(rough, 4, 1024)
        ours = run_to_end(slots, [job_of(prompt) for prompt in prompts])
        for prompt, (ids, logits) in zip(prompts, ours, strict=True):
            batch = chat.collate([prompt], GREEDY.pad_token_id)
            run = Generation(rough, batch, GREEDY)
            theirs = [run.logits[0]]
            for token in ids[:-1]:
                x = rough.language_model.model.embed_tokens(torch.tensor([[token]]))
                theirs.append(rough.decode(x, cache=run.cache)[0, 0])
            whole = torch.tensor([prompt.ids + ids[:-1]])
            wide = exact(whole, batch.mel, batch.conv_frames)[0, len(prompt.ids) - 1 :]
            _compare("logits", logits, torch.stack(theirs), wide, torch.bfloat16)


def test_encoding_packed_clips_equals_the_padded_batch(assistant):
    model = fresh()
    pack(model)
    clips = [noise(i, seconds)[0] for i, seconds in enumerate((0.4, 2.0, 0.03, 1.1))]
    slots = Slots(model, 1, 16)
    with torch.inference_mode():
        rows = slots.encode(clips)
        at = 0
        for clip in clips:
            prompt = chat.encode_raw("<|AUDIO|>", [(clip, 16000)], assistant.tokenizer)
            batch = chat.collate([prompt], 0)
            expected = model.encode_audio(batch.mel, batch.conv_frames)[0, : prompt.audio_tokens[0]]
            torch.testing.assert_close(rows[at : at + len(expected)], expected)
            at += len(expected)
    assert at == len(rows)


# --- the step as a recording ----------------------------------------------------------------------


def plain_linear(
    x, weight, bias=None, scale=None, residual=None, swiglu=False, deterministic=False
):
    y = F.linear(x, weight, bias)
    if swiglu:
        y = ops.swiglu(*y.chunk(2, -1))
    return y if residual is None else y + residual


def plain_decode_attention(q, k, v, lengths, key_start=None, k_scale=None, v_scale=None):
    if k_scale is not None:
        k, v = (k * k_scale[..., None]).to(q.dtype), (v * v_scale[..., None]).to(q.dtype)
    return ops.attention(q[:, None], k, v, key_end=lengths)[:, 0]


def plain_sample(logits, uniform, temperature, top_k, top_p, penalty, seen):
    s = logits.float()
    s = torch.where(seen, torch.where(s < 0, s * penalty[:, None], s / penalty[:, None]), s)
    likeliest = s.argmax(-1)
    s = s / torch.where(temperature > 0, temperature, 1)[:, None]
    ranked, order = s.sort(descending=True)
    rank = torch.arange(s.shape[1])
    ranked = ranked.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), float("-inf"))
    p = ranked.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p[:, None], 0.0)
    p = torch.zeros_like(p).scatter(1, order, p)
    drawn = (p.cumsum(-1) <= uniform[:, None] * p.sum(-1, keepdim=True)).sum(-1)
    return torch.where(temperature > 0, drawn.clamp(max=s.shape[1] - 1), likeliest)


PLAIN = SimpleNamespace(
    linear=plain_linear,
    decode_attention=plain_decode_attention,
    sample=plain_sample,
    rope=ops.rope,
    rope_into_cache=ops.rope_into_cache,
    attention=ops.sdpa,
    attention_varlen=ops.attention_varlen,
)


@pytest.mark.parametrize("int8", [False, True])
def test_a_recorded_step_replays_as_it_runs(assistant, int8):
    """Joins, leaves and moves between replays; every buffer the recording used must be live."""
    prompts = mixed(assistant, 7)
    settings = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY, GREEDY, DRAWN]
    joins = [0, 0, 1, 3, 3, 9, 15]
    model = fresh()
    pack(model)
    found = []
    with torch.inference_mode():
        for record in (None, tape.record):
            slots = Slots(model, 4, 1024, kernels=PLAIN, record=record, int8_cache=int8)
            slots.step = watch(slots)
            found.append(
                run_to_end(slots, [job_of(*p) for p in zip(prompts, settings, strict=True)], joins)
            )
    for (ids, _), (again, _) in zip(*found, strict=True):
        assert ids == again
        assert len(ids) == 12
    made = [key[0] for key in slots.recordings.made]
    assert made.count("step") >= 4  # numbers of rows, and lengths
    assert "prompt" in made or int8
    if not int8:
        for prompt, one, (ids, _) in zip(prompts, settings, found[0], strict=True):
            if not one.do_sample:
                assert ids == alone(assistant.model, prompt, one).ids


def test_a_recorded_step_weighs_what_it_drew(assistant):
    """One recording with log-probabilities and one without, taken by turns."""
    prompts = mixed(assistant, 3)
    model = fresh()
    pack(model)
    with engine_of(assistant, max_batch=3, max_tokens=1024) as engine:
        slots = engine.slots = Slots(model, 3, 1024, kernels=PLAIN, record=tape.record)
        first = engine.submit(prompts[0], GREEDY)
        engine.advance()
        short = replace(GREEDY, max_new_tokens=5)
        second = engine.submit(prompts[1], short, logprobs=4)
        second.result()
        third = engine.submit(prompts[2], short, logprobs=2)
        for request, prompt, settings, top in (
            (first, prompts[0], GREEDY, None),
            (second, prompts[1], short, 4),
            (third, prompts[2], short, 2),
        ):
            run = Generation(model, chat.collate([prompt], 0), settings, logprobs=top)
            while run.running:
                run.step()
            assert request.result().ids == run.answers[0].ids
            if top is not None:
                agree(request.result().logprobs, run.answers[0].logprobs)
    steps = [key for key in slots.recordings.made if key[0] == "step"]
    assert {weigh for *_, weigh in steps} == {True, False}


def watch(slots):
    """step, which also shows each row's logits; a recording's logits stand in its own buffer."""
    step = slots.step

    def watched(count):
        news = step(count)
        slots.seen_logits = {
            row: slots.logits[min(row, len(slots.logits) - 1)] for row in range(count)
        }
        return news

    return watched


def test_recording_changes_nothing(assistant):
    model = fresh()
    slots = Slots(model, 4, 1024, kernels=PLAIN, record=tape.record)
    prompts = mixed(assistant, 3)
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            job = job_of(prompt, DRAWN)
            job.row = row
            slots.prefill([job])
        state = {k: v.clone() for k, v in vars(slots).items() if isinstance(v, Tensor)}
        seen = slots.sampler.seen.clone()
        ended = slots.ended.clone()
        slots.ended.fill_(True)
        tape.record(lambda: slots._step(slice(0, 4), 512, False))
        slots.ended.copy_(ended)
    for name in ("ids", "lengths", "written", "budget", "ends", "ended"):
        assert torch.equal(getattr(slots, name), state[name]), name
    assert torch.equal(slots.sampler.seen[:3], seen[:3])


# --- short prompts and clips as recordings --------------------------------------------------------


def recording_slots(model, device="cpu", recorded=True, **options):
    """Slots whose readings are recorded: on tapes with plain operations, or as graphs."""
    kernels, record = PLAIN, tape.record
    if device == "cuda":
        backends.use(model, "triton")  # as the engine does
        kernels, record = backends.triton_kernels(), record_graph(torch.device(device))
    return Slots(model, 3, 1024, kernels=kernels, record=record if recorded else None, **options)


ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", ON)
def test_a_recorded_prompt_is_read_as_it_is_unrecorded(assistant, device):
    """Lengths on both sides of a multiple of 64, long before short, in rows in use by others."""
    model = fresh().to(device)
    pack(model)
    text = "one two three four " * 70
    with torch.inference_mode():
        plain, slots = (recording_slots(model, device, recorded) for recorded in (False, True))
        for turn, length in enumerate((200, 5, 64, 65, 128, 3, 256, 63, 256, 257, 1)):
            prompt = assistant.encode_raw("<|AUDIO|>" + text, [noise(turn, 0.3)])
            assert len(prompt.ids) > 257
            prompt = replace(prompt, ids=prompt.ids[:length])
            if length < 10:
                prompt = replace(prompt, ids=prompt.ids[-1:] * length, clips=[])
            job = job_of(prompt, GREEDY)
            job.row = turn % 3
            before = [x.clone() for x in slots.cache.tensors]
            for each in (plain, slots):
                each.clear(job.row)
                each.prefill([replace(job)])
            torch.testing.assert_close(slots.logits, plain.logits)
            for mine, its, old in zip(
                slots.cache.tensors, plain.cache.tensors, before, strict=True
            ):
                torch.testing.assert_close(mine[:, job.row, :length], its[:, job.row, :length])
                for other in {0, 1, 2} - {job.row}:
                    assert torch.equal(mine[:, other], old[:, other])
                assert mine.isfinite().all()
        assert list(slots.encode.recordings.made) == [64]
        assert sorted(slots.recordings.made) == [("prompt", n) for n in (64, 128, 256)]


@pytest.mark.parametrize("device", ON)
def test_a_recorded_clip_is_heard_as_it_is_unrecorded(device):
    """Around multiples of 64 frames, the longest first, so that what it left would be heard."""
    model = fresh().to(device)
    pack(model)
    with torch.inference_mode():
        plain, slots = (recording_slots(model, device, recorded) for recorded in (False, True))
        for i, frames in enumerate((512, 2, 63, 64, 65, 1500, 127, 128, 1473, 3)):
            clip = noise(i, frames * 320 / 16000)[0]
            assert clip_lengths(len(clip)).conv_frames == frames
            heard = slots.encode([clip])
            expected = plain.encode([clip])
            slots.encode([clip.flip(0)])  # what was heard before is the caller's own
            torch.testing.assert_close(heard, expected)
            assert len(heard) == frames // 2
        assert sorted(slots.encode.recordings.made) == [64, 128, 512, 1500]


@pytest.mark.parametrize("device", ON)
def test_several_clips_are_heard_as_each_alone(device):
    model = fresh().to(device)
    pack(model)
    lengths = (0.4, 2.0, 0.03, 1.1)
    clips = [noise(i, seconds)[0] for i, seconds in enumerate(lengths)]
    with torch.inference_mode():
        slots = recording_slots(model, device)
        together = slots.encode(clips)
        apart = torch.cat([slots.encode([clip]) for clip in clips])
    torch.testing.assert_close(together, apart)


@pytest.mark.gpu
def test_forgotten_graphs_make_room_for_new_ones(assistant):
    model = fresh().cuda()
    prompt = next(one for one in mixed(assistant, 9) if len(one.clips) == 1)
    with Engine(model, max_batch=2, max_tokens=1024, worker=False) as engine:
        engine.warm()
        for _ in range(3):
            answer = engine.generate([prompt], GREEDY)[0]
            assert answer.ids == alone(assistant.model, prompt, GREEDY).ids
            engine.forget()


def test_what_is_forgotten_is_recorded_anew(assistant):
    """A model that has changed is not answered for by graphs of the old one."""
    model = fresh()
    prompt = next(one for one in mixed(assistant, 9) if len(one.clips) == 1)
    prompt = assistant.encode_raw("<|AUDIO|>say", [(prompt.clips[0], 16000)])
    with Engine(model, max_batch=2, max_tokens=1024, worker=False) as engine:
        engine.slots = Slots(model, 2, 1024, kernels=PLAIN, record=tape.record)
        before = engine.generate([prompt], GREEDY)[0].ids
        model.language_model.model.norm.rms_norm_op = lambda x, *rest: -ops.rms_norm(x, *rest)
        model.audio_tower.layer_norm.layer_norm_op = lambda x, *rest: -ops.layer_norm(x, *rest)
        engine.forget()
        assert engine.slots.logits is None  # which would keep a graph's memory
        after = engine.generate([prompt], GREEDY)[0].ids
        assert len(engine.slots.encode.recordings.made) == 1
        assert {key[0] for key in engine.slots.recordings.made} == {"prompt", "step"}
    assert after == generate(model, chat.collate([prompt], 0), GREEDY)[0].ids != before


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("int8", [False, True])
def test_a_warm_engine_records_nothing_more(assistant, device, int8):
    """And has nothing left in it of what it warmed up with."""
    model = fresh().to(device)
    pack(model)
    slots = recording_slots(model, device, int8_cache=int8)
    with torch.inference_mode():
        before = {k: v.clone() for k, v in vars(slots).items() if isinstance(v, Tensor)}
        slots.warm()
        for name in ("lengths", "ended"):
            assert torch.equal(getattr(slots, name), before[name])
        assert not any(tensor.any() for tensor in slots.cache.tensors)
        made = set(slots.recordings.made), set(slots.encode.recordings.made)
        assert made[1] == {64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1500}
        prompts = mixed(assistant, 7)
        jobs = [job_of(prompt, GREEDY) for prompt in prompts]
        slots.step = watch(slots)
        found = run_to_end(slots, jobs, [0, 0, 1, 3, 3, 9, 15])
    assert made == (set(slots.recordings.made), set(slots.encode.recordings.made))
    if not int8:
        for prompt, (ids, _) in zip(prompts, found, strict=True):
            assert ids == alone(assistant.model, prompt, GREEDY).ids


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("slots", "tokens"), [(2, 1), (1, 2), (2, 3), (1, 5), (5, 64), (2, 100), (70, 300)]
)
def test_warming_up_an_engine_of_any_size(assistant, slots, tokens, recorded):
    with Engine(fresh(), max_batch=slots, max_tokens=tokens, worker=False) as engine:
        if recorded:
            options = {"kernels": PLAIN, "record": tape.record}
            engine.slots = Slots(engine.model, slots, tokens, **options)
        engine.warm()
        made = set(engine.slots.recordings.made) if recorded else set()
        prompt = assistant.encode_raw("one two", [])
        if tokens >= 64:
            expected = alone(assistant.model, prompt, GREEDY).ids
            answers = engine.generate([prompt] * slots, GREEDY)
            assert all(answer.ids == expected for answer in answers)
        if recorded:
            assert made == set(engine.slots.recordings.made)
            steps = {key[1] for key in made if key[0] == "step"}
            assert steps == {n for n in (1, 2, 4, 8, 16, 32, 64) if n < slots} | {slots}


def test_an_engine_with_requests_is_not_warmed_up(assistant):
    prompt = assistant.encode_raw("one two", [])
    with Engine(fresh(), max_batch=2, max_tokens=100, worker=False) as engine:
        request = engine.submit(prompt, GREEDY)
        with pytest.raises(InputError, match="before its first request"):
            engine.warm()
        engine.advance()
        with pytest.raises(InputError, match="before its first request"):
            engine.warm()
        assert request.result().ids == alone(assistant.model, prompt, GREEDY).ids


@pytest.mark.parametrize("positions", [50, 1500, 2000])
def test_a_table_of_positions_of_another_length(assistant, positions):
    """A clip has no more than 1,500 frames, however many the table has; here they are recorded."""
    model = fresh()
    audio = replace(model.config.audio, max_source_positions=positions)
    model.config = replace(model.config, audio=audio)
    table = model.audio_tower.embed_positions
    table.weight = torch.nn.Parameter(torch.randn(positions, table.weight.shape[1]))
    with torch.inference_mode():
        plain, slots = (recording_slots(model, recorded=recorded) for recorded in (False, True))
        slots.warm()
        assert max(slots.encode.recordings.made) == min(positions, 1500)
        for frames in (min(positions, 1500), 40):
            clip = noise(frames, frames * 320 / 16000)[0]
            torch.testing.assert_close(slots.encode([clip]), plain.encode([clip]))


def test_what_a_recorded_prompt_is_not_for(assistant):
    """Several prompts, one whose beginning is known, one too long, and codes in the cache."""
    model = fresh()
    prompt = assistant.encode_raw("one two three", [])
    job = job_of(prompt, GREEDY)
    with torch.inference_mode():
        slots = recording_slots(model)
        assert slots._short([job])
        assert not slots._short([job, job])
        assert not slots._short([replace(job, start=2)])
        assert not slots._short([replace(job, ids=job.ids[:1] * 257)])
        assert not recording_slots(model, int8_cache=True)._short([job])
        small = Slots(model, 1, 63, kernels=PLAIN, record=tape.record)  # 64 do not fit
        assert not small._short([job])
        small.prefill([job])
        assert not Slots(model, 1, 1024, kernels=PLAIN)._short([job])


def test_the_tape_finds_what_a_graph_would_break():
    x = torch.zeros(3)

    for waits in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x.any())):
        for mode in (True, False):
            with (
                torch.inference_mode(mode),
                pytest.raises(AssertionError, match="waits"),
                tape.Tape(),
            ):
                waits()
    state = SimpleNamespace(x=torch.zeros(3), y=torch.zeros(3))

    def stale():
        state.y.copy_(state.x + 1)

    with tape.Tape() as taped:
        stale()
    state.x = torch.ones(3)  # not the tensor that was recorded
    taped.replay()
    assert state.y.tolist() == [1, 1, 1]
    state.y.zero_()
    taped.replay()
    assert state.y.tolist() == [1, 1, 1]


def test_the_fused_step_on_triton(assistant):
    """The whole path of a GPU but the graph, its kernels in the interpreter."""
    pytest.importorskip("triton")
    model = fresh()
    prompts = [
        assistant.encode_raw("<|AUDIO|>say", [noise(1, 0.3)]),
        assistant.encode_raw("one two", []),
    ]
    short = Settings(max_new_tokens=3, eos_token_ids=(), repetition_penalty=1.2)
    with Engine(
        model, max_batch=2, max_tokens=128, backend="triton", packed=True, worker=False
    ) as engine:
        answers = engine.generate(prompts, short)
        few = replace(DRAWN, max_new_tokens=2)
        drawn = [engine.submit(prompts[1], few, seed=1).result().ids for _ in range(2)]
    assert drawn[0] == drawn[1]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == alone(assistant.model, prompt, short).ids
    assert model.language_model.model.norm.rms_norm_op is ops.rms_norm  # given back


# --- batch invariance -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_is_bit_for_bit_the_same_in_any_company(assistant, dtype):
    prompts = mixed(assistant, 5)
    model = fresh(dtype)
    draw = random.Random(1)
    with torch.inference_mode():

        def answered(order, joins, count):
            slots = Watched(model, count, 1024, deterministic=True)
            jobs = [
                job_of(prompts[i], Settings(max_new_tokens=4 + i, eos_token_ids=())) for i in order
            ]
            return dict(zip(order, run_to_end(slots, jobs, joins), strict=True))

        reference = {i: answered([i], None, 1)[i] for i in range(len(prompts))}
        for _ in range(6):
            order = draw.sample(range(len(prompts)), draw.randrange(2, 6))
            joins = [draw.randrange(6) for _ in order]
            for i, (ids, logits) in answered(order, joins, draw.randrange(2, 5)).items():
                assert ids == reference[i][0]
                assert torch.equal(logits, reference[i][1]), (i, order, joins)


def test_without_it_the_bits_depend_on_the_company(assistant):
    """So that the test above is known to see the difference."""
    prompts = mixed(assistant, 5)
    model = fresh(torch.float32)
    with torch.inference_mode():
        one = run_to_end(Watched(model, 1, 1024), [job_of(prompts[0])])[0][1]
        jobs = [job_of(prompt) for prompt in prompts]
        many = run_to_end(Watched(model, 5, 1024), jobs)[0][1]
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-3)
    assert not torch.equal(one, many)


# --- the prefix cache -----------------------------------------------------------------------------


def counted(engine, monkeypatch):
    """How many clips were encoded, and positions read, from here on."""
    counts = {"clips": 0, "ids": 0}
    encode, prefill = engine.slots.encode, engine.slots.prefill

    def count_clips(clips):
        counts["clips"] += len(clips)
        return encode(clips)

    def count_ids(jobs):
        counts["ids"] += sum(len(job.ids) - job.start for job in jobs)
        return prefill(jobs)

    monkeypatch.setattr(engine.slots, "encode", count_clips)
    monkeypatch.setattr(engine.slots, "prefill", count_ids)
    return counts


@pytest.mark.parametrize("int8", [False, True])
def test_a_second_question_reads_the_clip_no_more(assistant, monkeypatch, int8):
    clip = noise(1, 2.0)
    first = assistant.encode([user_turn("What is said?", clip)])
    second = assistant.encode([user_turn("Who speaks?", clip)])
    other = assistant.encode([user_turn("Who speaks?", noise(2, 2.0))])
    options = {"max_batch": 2, "max_tokens": 512, "worker": False, "int8_cache": int8}
    with Engine(assistant.model, prefix_bytes=0, **options) as engine:
        expected = [answer.ids for answer in engine.generate([first, second, other], GREEDY)]
        assert len(engine.prefixes) == 0
    with Engine(assistant.model, **options) as engine:
        counts = counted(engine, monkeypatch)
        assert engine.generate([first], GREEDY)[0].ids == expected[0]
        assert counts == {"clips": 1, "ids": len(first.ids)}
        request = engine.submit(second, GREEDY)
        assert request.result().ids == expected[1]
        assert request.reused >= 50 and counts["clips"] == 1
        assert counts["ids"] == len(first.ids) + len(second.ids) - request.reused
        third = engine.submit(other, GREEDY)
        assert third.result().ids == expected[2]
        assert counts["clips"] == 2
        assert third.reused in (0, other.ids.index(assistant.model.config.audio_token_id))


def test_the_next_turn_reads_only_what_is_new(assistant, monkeypatch):
    messages = [user_turn("What is it?", [noise(1, 1.0), noise(2, 0.5)])]
    settings = Settings(max_new_tokens=10, eos_token_ids=())
    with Engine(assistant.model, max_batch=2, max_tokens=1024, worker=False) as engine:
        counts = counted(engine, monkeypatch)
        prompt = assistant.encode(messages)
        answer = engine.generate([prompt], settings)[0]
        # The next prompt as ids, for a random model's answer is not always text that reads back.
        tail = assistant.tokenizer.encode("more?")
        again = chat.Prompt(prompt.ids + answer.ids + tail, prompt.clips, prompt.audio_tokens, [])
        request = engine.submit(again, settings)
        ids = request.result().ids
        assert request.reused == len(prompt.ids) + len(answer.ids) - 1  # its last id was never read
        assert counts["clips"] == 2
        assert counts["ids"] == len(prompt.ids) + 1 + len(tail)
    assert ids == alone(assistant.model, again, settings).ids


def test_simultaneous_questions_about_one_clip_encode_it_once(assistant, monkeypatch):
    clip = noise(5, 1.5)
    prompts = [assistant.encode([user_turn(text, clip)]) for text in ("One?", "Two?", "Three?")]
    with Engine(assistant.model, max_batch=4, max_tokens=512, worker=False) as engine:
        counts = counted(engine, monkeypatch)
        answers = engine.generate(prompts, GREEDY)
        assert counts["clips"] == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == alone(assistant.model, prompt, GREEDY).ids


def test_a_prefix_may_end_inside_a_clip(assistant):
    prompt = assistant.encode_raw("x" * 40 + "<|audio_bos|><|AUDIO|><|audio_eos|>", [noise(3, 2.0)])
    prompt = chat.Prompt(prompt.ids[:-1], prompt.clips, prompt.audio_tokens, [])  # ends with sound
    with Engine(assistant.model, max_batch=1, max_tokens=512, worker=False) as engine:
        one = engine.submit(prompt, GREEDY)
        two = (one.result(), engine.submit(prompt, GREEDY))[1]
        assert two.result().ids == one.ids == alone(assistant.model, prompt, GREEDY).ids
        assert (one.reused, two.reused) == (0, len(prompt.ids) - 1)


def test_prefix_cache_holds_no_more_than_its_bytes():
    cache = PrefixCache(limit=4000)

    def kept(first, length=100):
        return Beginning([first] * length, [], [torch.zeros(1, length, 3)])

    for first in range(5):
        cache.add(kept(first))
        assert cache.bytes <= 4000 and cache.bytes == sum(
            entry.bytes for entry in cache._entries.values()
        )
    assert len(cache) == 3
    wanted = Beginning([2] * 150, [])
    assert cache.find(wanted)[1] == 100  # and is the one used last now
    cache.add(kept(7))
    assert cache.find(wanted)[1] == 100 and cache.find(Beginning([3] * 150, []))[0] is None
    cache.add(kept(8, 1000))
    assert len(cache) == 3  # larger than all of it: not kept, and nothing lost
    cache.add(kept(2, 120))
    assert cache.find(wanted)[1] == 120 and cache.holds(Beginning([2] * 110, []))
    assert not cache.holds(Beginning([2] * 121, []))
    assert cache.find(Beginning([2] * 20, [])) == (None, 0)


def test_prefixes_are_found_as_by_looking_at_all_of_them():
    draw = random.Random(0)

    def conversation():
        """Of few heads, clips and words, so that many begin alike and some go on from others."""
        ids = [1] * draw.choice((10, 40, 70))
        clips = []
        for _ in range(draw.randrange(3)):
            clips.append((len(ids), draw.choice((b"a", b"b"))))
            ids += [9] * draw.choice((5, 40))
            ids += [draw.randrange(2, 4)] * draw.choice((3, 33, 50))
        return Beginning(ids, clips, [torch.zeros(len(ids), 3)])

    cache, kept = PrefixCache(limit=100_000), []
    found = 0
    for _ in range(600):
        wanted = conversation()
        lengths = [min(entry.shared(wanted), len(wanted.ids) - 1) for entry in kept]
        best, most = cache.find(wanted)
        expected = max((n for n in lengths if n >= 32), default=0)
        assert expected - 32 < most <= expected
        if best is not None:
            assert min(best.shared(wanted), len(wanted.ids) - 1) == most
            found += 1
        if cache.holds(wanted):
            assert any(entry.shared(wanted) == len(wanted.ids) for entry in kept)
        cache.add(wanted)
        kept = list(cache._entries.values())
        assert cache.bytes == sum(entry.bytes for entry in kept) <= 100_000
        assert not any(entry.shared(wanted) == len(entry.ids) for entry in kept[:-1])
        assert {key for entry in kept for key in entry.keys} == set(cache._blocks)
        assert {entry.keys[-1] for entry in kept} == set(cache._ends)
    assert found > 300 and 50 < len(kept) < 600
    for number in list(cache._entries):
        cache._remove(number)
    assert cache.bytes == len(cache) == len(cache._blocks) == len(cache._ends) == 0


def test_looking_takes_no_longer_for_many(monkeypatch):
    cache = PrefixCache(limit=10**9)
    for i in range(2000):
        cache.add(Beginning([1] * 64 + [2 + i] * 40, [], [torch.zeros(1)]))
    looks = []
    shared = Beginning.shared
    monkeypatch.setattr(
        Beginning, "shared", lambda self, other: looks.append(0) or shared(self, other)
    )
    wanted = Beginning([1] * 64 + [77] * 40, [], [torch.zeros(1)])
    assert cache.find(wanted)[1] == 103 and cache.holds(wanted)
    assert cache.find(Beginning([1] * 70, []))[1] == 64
    cache.add(wanted)
    assert len(cache) == 2000 and len(looks) < 30


def test_clips_are_known_by_their_samples():
    ids = [1] * 40 + [9] * 10 + [2] * 40
    mine = Beginning(ids, [(40, b"a")])
    assert mine.shared(Beginning(ids, [(40, b"a")])) == 90
    assert mine.shared(Beginning(ids, [(40, b"b")])) == 40
    assert mine.shared(Beginning(ids[:30], [])) == 30
    assert mine.shared(Beginning(ids, [])) == Beginning(ids, []).shared(mine) == 40  # no clip there
    assert runs(ids, 9) == [(40, 10)]
    assert runs([9, 9, 1, 9], 9) == [(0, 2), (3, 1)]


def test_a_copy_that_finds_no_memory_costs_nobody_an_answer(assistant, monkeypatch):
    prompts = mixed(assistant, 3)
    with engine_of(assistant, max_batch=3) as engine:

        def full(row, length):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(engine.slots.cache, "save", full)
        for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
            assert answer.ids == alone(assistant.model, prompt, GREEDY).ids
        assert len(engine.prefixes) == 0


def test_memory_is_made_before_the_copy_and_none_is_made_in_vain(assistant, monkeypatch):
    prompts = mixed(assistant, 6)
    with engine_of(assistant) as engine:
        needed = [engine.slots.cache.bytes(len(prompt.ids) + 11) for prompt in prompts]
    limit = sorted(needed)[-2]  # what is longest is never kept
    with engine_of(assistant, prefix_bytes=limit) as engine:
        save = engine.slots.cache.save
        copied = []

        def watched(row, length):
            saved = save(row, length)
            copied.append(sum(tensor.nbytes for tensor in saved))
            assert engine.prefixes.bytes + copied[-1] <= limit
            assert copied[-1] == engine.slots.cache.bytes(length)
            return saved

        monkeypatch.setattr(engine.slots.cache, "save", watched)
        engine.generate(prompts, GREEDY)
        assert max(copied) <= limit < max(needed) and engine.prefixes.bytes > 0


def test_a_model_that_has_changed_is_forgotten(assistant):
    model = fresh()
    prompt = mixed(assistant, 1)[0]
    with Engine(model, max_batch=2, max_tokens=512, worker=False) as engine:
        running = engine.submit(prompt, GREEDY)
        engine.advance()
        before = alone(model, prompt, GREEDY).ids
        with torch.no_grad():
            model.language_model.model.embed_tokens.weight.mul_(-1.5)
        KNOWN.clear()
        after = alone(model, prompt, GREEDY).ids
        assert after != before
        assert engine.generate([prompt], GREEDY)[0].ids != after  # half of it the old model's
        engine.forget()
        assert len(engine.prefixes) == 0
        running.result()  # which ends as neither, and is not kept
        assert engine.generate([prompt], GREEDY)[0].ids == after


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_that_are_loaded_anew_are_those_that_answer(assistant, bits):
    models = fresh(), fresh()
    with torch.no_grad():
        for layer in models[1].language_model.model.layers:
            layer.mlp.down_proj.weight.neg_()
            layer.self_attn.q_proj.weight.mul_(-1.5)
            layer.self_attn.v_proj.bias.add_(0.1)
    for model in models:
        quantize.quantize(model, bits)
    model, other = models
    prompt = mixed(assistant, 1)[0]

    def logits(slots):
        with torch.inference_mode():
            slots.clear(0)
            slots.prefill([job_of(prompt)])
            slots.step(1)
        return slots.logits.clone()

    with Engine(model, max_batch=2, max_tokens=512, worker=False) as engine:
        before = logits(engine.slots)
        model.load_state_dict(other.state_dict())
        engine.forget()
        after = logits(engine.slots)
    with Engine(other, max_batch=2, max_tokens=512, worker=False) as engine:
        expected = logits(engine.slots)
    scale = expected.abs().max()
    assert (after - expected).abs().max() < 0.03 * scale < 0.1 * (before - expected).abs().max()


# --- many callers ---------------------------------------------------------------------------------


def engine_of(assistant, **options):
    options = {"max_batch": 2, "max_tokens": 512, "worker": False} | options
    return Engine(assistant.model, **options)


def test_first_come_first_served(assistant):
    prompts = mixed(assistant, 5)
    order = []
    with engine_of(assistant) as engine:
        for i, prompt in enumerate(prompts):
            first = {i}

            def watch(token, i=i, first=first):
                if first:
                    order.append(first.pop())

            engine.submit(prompt, GREEDY, on_token=watch)
        while engine.advance():
            assert len(engine._active) <= 2
    assert order == [0, 1, 2, 3, 4]


def test_a_request_joins_while_others_are_written(assistant):
    prompts = mixed(assistant, 2)
    with engine_of(assistant) as engine:
        one = engine.submit(prompts[0], GREEDY)
        for _ in range(4):
            engine.advance()
        two = engine.submit(prompts[1], GREEDY)
        engine.advance()
        assert len(one.ids) == 6 and len(two.ids) == 2
        for request, prompt in ((one, prompts[0]), (two, prompts[1])):
            assert request.result().ids == alone(assistant.model, prompt, GREEDY).ids


def test_prefill_is_bounded_while_others_wait(assistant):
    prompts = mixed(assistant, 4)
    tokens = []
    with engine_of(assistant, max_batch=4, prefill_tokens=1) as engine:
        prefill = engine.slots.prefill
        engine.slots.prefill = lambda jobs: tokens.append(len(jobs)) or prefill(jobs)
        engine.generate(prompts, GREEDY)
    assert tokens == [1, 1, 1, 1]


def test_cancelling_frees_the_slot_at_once(assistant):
    prompts = mixed(assistant, 3)
    with engine_of(assistant, max_batch=1) as engine:
        one, two, three = (engine.submit(prompt, GREEDY) for prompt in prompts)
        engine.advance()
        two.cancel()
        assert two.finish_reason == "cancelled" and not two.ids  # it never left the queue
        one.cancel()
        engine.advance()
        assert one.finish_reason == "cancelled" and len(one.ids) == 2
        assert len(three.ids) == 2  # in the slot by the very next step
        assert three.result().ids == alone(assistant.model, prompts[2], GREEDY).ids
        one.cancel()
        assert one.result().finish_reason == "cancelled"


def test_the_caller_ends_an_answer(assistant):
    prompts = mixed(assistant, 2)
    with engine_of(assistant) as engine:
        seen = []
        one = engine.submit(prompts[0], GREEDY, on_token=lambda t: seen.append(t) or len(seen) == 3)
        two = engine.submit(prompts[1], GREEDY)
        got = []
        for token in two:
            got.append(token)
            if len(got) == 5:
                two.finish()
        assert one.ids == seen and len(seen) == 3 and one.finish_reason == "stop"
        assert len(got) == 5 and two.finish_reason == "stop"


def test_the_callers_end_at_the_last_token_is_the_callers(assistant):
    prompt = mixed(assistant, 1)[0]
    with engine_of(assistant) as engine:
        count = GREEDY.max_new_tokens
        one = engine.submit(prompt, GREEDY, on_token=lambda _: len(one.ids) == count)
        assert one.result().finish_reason == "stop" and len(one.ids) == count


def test_the_end_is_told_once_however_it_comes(assistant, monkeypatch):
    prompts = mixed(assistant, 6)
    told = []

    def submit(engine, i, **options):
        settings = replace(GREEDY, max_new_tokens=4)
        return engine.submit(prompts[i], settings, on_end=told.append, **options)

    with engine_of(assistant, max_batch=4, prefix_bytes=0) as engine:
        assert engine.open and (engine.active, engine.waiting) == (0, 0)
        length = submit(engine, 0)
        stopped = submit(engine, 1, on_token=lambda token: True)
        broken = submit(engine, 2, on_token=lambda token: {}[token])
        cancelled = submit(engine, 3)
        queued = submit(engine, 4)
        assert (engine.active, engine.waiting) == (0, 5)
        queued.cancel()
        queued.cancel()
        assert told == [queued]
        engine.advance()
        assert (engine.active, engine.waiting) == (2, 0) and set(told) == {queued, stopped, broken}
        cancelled.cancel()
        length.result()
        left = submit(engine, 5)
        engine.advance()
    assert not engine.open and engine.active == 0
    assert len(told) == 6 and [request.finish_reason for request in told[3:]] == [
        *("cancelled", "length", "cancelled")
    ]
    assert set(told) == {length, stopped, broken, cancelled, queued, left}


def test_an_error_in_one_request_is_its_own(assistant, monkeypatch):
    prompts = mixed(assistant, 4)
    expected = [alone(assistant.model, prompt, GREEDY).ids for prompt in prompts]
    with engine_of(assistant, max_batch=4, prefix_bytes=0) as engine:

        def breaks(token):
            raise KeyError("the caller's own")

        bad = engine.submit(prompts[0], GREEDY, on_token=breaks)
        good = [engine.submit(prompt, GREEDY) for prompt in prompts[1:]]
        assert [request.result().ids for request in good] == expected[1:]
        with pytest.raises(KeyError, match="own"):
            bad.result()
        assert bad.finish_reason == "error" and bad.ids == expected[0][:1]

        # One of a group cannot be read: the others are, all the same.
        prefill = engine.slots.prefill

        def fails(jobs):
            if any(job.ids is prompts[2].ids for job in jobs):
                raise RuntimeError("out of memory")
            return prefill(jobs)

        monkeypatch.setattr(engine.slots, "prefill", fails)
        requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
        for i, request in enumerate(requests):
            if i == 2:
                with pytest.raises(RuntimeError, match="out of memory"):
                    list(request)
            else:
                assert request.result().ids == expected[i]


@pytest.mark.parametrize("settings", [DRAWN, GREEDY])
def test_logits_that_are_not_finite_end_one_row(assistant, settings):
    prompts = mixed(assistant, 3)
    with engine_of(assistant, max_batch=3, prefix_bytes=0) as engine:
        requests = [engine.submit(prompt, settings, seed=i) for i, prompt in enumerate(prompts)]
        engine.advance()
        head = engine.slots.head

        def spoil(x):
            logits = head(x)
            logits[1] = float("nan")
            return logits

        engine.slots.head = spoil
        engine.advance()
        engine.slots.head = head
        for i in (0, 2):
            expected = alone(assistant.model, prompts[i], settings, seed=i).ids
            assert requests[i].result().ids == expected
        with pytest.raises(CheckpointError, match="not finite"):
            requests[1].result()
        # Whatever the row held, the next conversation there is as in any other.
        assert (
            engine.generate(prompts[:1], GREEDY)[0].ids
            == alone(assistant.model, prompts[0], GREEDY).ids
        )


def test_what_can_never_fit_is_refused(assistant):
    prompt = mixed(assistant, 1)[0]
    audio = assistant.model.config.audio_token_id
    length = len(prompt.ids)
    with engine_of(assistant, max_tokens=length + 9) as engine:
        engine.submit(prompt, Settings(max_new_tokens=10))
        with pytest.raises(InputError, match=rf"prompt of {length} tokens .* up to 11 exceed"):
            engine.submit(prompt, Settings(max_new_tokens=11))
        with pytest.raises(InputError, match="17 end tokens"):
            engine.submit(prompt, Settings(max_new_tokens=1, eos_token_ids=tuple(range(17))))
        broken = {
            "is empty": [],
            "outside the vocabulary": [1, 10**6],
            "0 clips were given, the prompt has places for 1": [1, audio],
        }
        for message, ids in broken.items():
            with pytest.raises(PromptError, match=message):
                engine.submit(chat.Prompt(ids, [], [], []), GREEDY)
        with pytest.raises(PromptError, match="0 clips were given, the prompt has places for 1"):
            engine.submit(chat.Prompt([audio] * 25, [], [25], []), GREEDY)  # the clip itself is not
        second = noise(0, 1.0)[0]
        with pytest.raises(PromptError, match="the places of two clips touch"):
            engine.submit(chat.Prompt([audio] * 50, [second] * 2, [25] * 2, []), GREEDY)
        with pytest.raises(PromptError, match="clip 1 needs 25 audio tokens, the prompt holds 24"):
            engine.submit(chat.Prompt([audio] * 24, [noise(0, 1.0)[0]], [25], []), GREEDY)
    for options in ({"max_batch": 0}, {"max_tokens": 0}, {"backend": "cuda"}):
        with pytest.raises(InputError):
            engine_of(assistant, **options)


def test_callers_in_threads_of_their_own(assistant):
    prompts = mixed(assistant, 8)
    expected = [alone(assistant.model, prompt, GREEDY).ids for prompt in prompts]
    found = [None] * len(prompts)
    with engine_of(assistant, max_batch=3, worker=True) as engine:

        def ask(i):
            found[i] = list(engine.submit(prompts[i], GREEDY))

        callers = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    assert found == expected


def test_closing_leaves_nobody_waiting(assistant):
    prompts = mixed(assistant, 3)
    long = Settings(max_new_tokens=300, eos_token_ids=())
    engine = engine_of(assistant, max_batch=1, max_tokens=1024, worker=True)
    requests = [engine.submit(prompt, long) for prompt in prompts]
    next(iter(requests[0]))
    with pytest.raises(TimeoutError):
        requests[2].result(timeout=0.01)
    engine.close()
    assert {request.result(10).finish_reason for request in requests} == {"cancelled"}
    assert not engine._thread.is_alive()
    with pytest.raises(InputError, match="closed"):
        engine.submit(prompts[0], long)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_reaches_every_caller(assistant, monkeypatch):
    prompts = mixed(assistant, 2)
    engine = engine_of(assistant, max_batch=1, worker=True)

    def broken():
        raise AssertionError("a mistake")

    monkeypatch.setattr(engine, "_next_group", broken)
    request = engine.submit(prompts[0], GREEDY)
    with pytest.raises(AssertionError, match="a mistake"):
        request.result(10)
    with pytest.raises(InputError, match="closed"):
        engine.submit(prompts[1], GREEDY)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("worker", [False, True])
def test_a_fault_while_a_group_is_read_reaches_all_of_it(assistant, monkeypatch, worker):
    engine = engine_of(assistant, max_batch=4, worker=worker)

    def broken(row, length):
        raise AssertionError("a mistake")

    monkeypatch.setattr(engine, "_keep", broken)
    with engine._changed:  # the worker finds all three
        requests = [engine.submit(prompt, GREEDY) for prompt in mixed(assistant, 3)]
    for request in requests:
        with pytest.raises(AssertionError, match="a mistake"):
            request.result(10)
        assert request.finish_reason == "error"
    assert not engine.open and (engine.active, engine.waiting) == (0, 0)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("fault", ["on_end", "clear"])
def test_a_fault_as_several_end_reaches_all_of_them(assistant, monkeypatch, worker, fault):
    engine = engine_of(assistant, max_batch=3, prefix_bytes=0, worker=worker)
    told = []

    def broken(*_):
        told.append(_)
        if len(told) == 2:
            raise RuntimeError("a mistake")

    if fault == "clear":
        monkeypatch.setattr(engine.slots, "clear", broken)
    options = {"on_end": broken} if fault == "on_end" else {}
    with engine._changed:
        requests = [engine.submit(prompt, GREEDY, **options) for prompt in mixed(assistant, 3)]
    if worker:
        engine._thread.join(30)
    else:
        with pytest.raises(RuntimeError, match="a mistake"):
            while engine.advance():
                pass
    assert all(request.finish_reason for request in requests) and not engine.open
    assert (engine.active, engine.waiting) == (0, 0)
    engine.close()


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("event", ["on_token", "on_end"])
def test_a_request_may_close_the_engine(assistant, worker, event):
    engine = engine_of(assistant, max_batch=3, worker=worker)

    def close(*_):
        engine.close()

    prompts = mixed(assistant, 5)
    short = replace(GREEDY, max_new_tokens=3)
    with engine._changed:
        requests = [engine.submit(prompt, GREEDY) for prompt in prompts[:2]]
        requests.insert(1, engine.submit(prompts[2], short, **{event: close}))
        requests += [engine.submit(prompt, GREEDY) for prompt in prompts[3:]]
    while not worker and engine.advance():
        pass
    reasons = [request.result(10).finish_reason for request in requests]
    assert reasons[1] == ("length" if event == "on_end" else "cancelled")
    assert {*reasons[:1], *reasons[2:]} == {"cancelled"}
    if worker:
        engine._thread.join(10)
        assert not engine._thread.is_alive()
    engine.close()


# --- memory and numbers ---------------------------------------------------------------------------


def test_int8_codes_are_within_half_a_step():
    x = torch.randn(5, 7, 64) * torch.logspace(-6, 3, 7)[:, None]
    x[0] = 0
    codes, scale = ops.quantise(x)
    assert codes.dtype == torch.int8 and scale.shape == (5, 7)
    back = codes * scale[..., None]
    assert ((back - x).abs() <= 0.5001 * scale[..., None]).all()
    assert (scale * 127 - x.abs().amax(-1)).abs().max() <= 1e-4 * scale.max()


def test_int8_cache_is_half_the_memory_and_close(assistant):
    """Its relative error of the logits stays in the order of bfloat16's own rounding, 2^-8."""
    text = assistant.model.config.text
    full, half = (
        SlotCache(text, 2, 64, torch.device("cpu"), torch.bfloat16, int8) for int8 in (False, True)
    )
    bytes_full, bytes_half = (sum(t.nbytes for t in cache.tensors) for cache in (full, half))
    assert bytes_half == bytes_full * (text.head_dim + 4) / (2 * text.head_dim)
    prompts = mixed(assistant, 4)
    with torch.inference_mode():
        for prompt in prompts:
            logits = []
            for int8 in (False, True):
                slots = Watched(assistant.model, 1, 1024, int8_cache=int8)
                slots.prefill([job_of(prompt)])
                logits.append(slots.logits)
            error = (logits[1] - logits[0]).norm() / logits[0].norm()
            assert 0 < error < 2**-6


def test_a_quantised_model_answers_as_it_does_without_the_engine():
    assistant = load("random", device="cpu")
    quantize.quantize(assistant.model, 8)
    prompts = mixed(assistant, 3)
    settings = Settings(max_new_tokens=8, eos_token_ids=())
    with Engine(assistant.model, max_batch=3, max_tokens=512, worker=False) as engine:
        for prompt, ours in zip(prompts, engine.generate(prompts, settings), strict=True):
            batch = chat.collate([prompt], 0)
            inputs = {"ids": batch.ids, "mel": batch.mel, "conv_frames": batch.conv_frames}
            assert ours.ids == quantize.answer(assistant.model, [inputs], 8)[0].ids[0].tolist()


@pytest.mark.parametrize("recorded", [False, True])
def test_slots_forget_what_they_held(assistant, recorded):
    options = {"kernels": PLAIN, "record": tape.record} if recorded else {}
    slots = Slots(assistant.model, 2, 256, **options)
    prompt = assistant.encode_raw("one two three", [])
    with torch.inference_mode():
        slots.prefill([job_of(prompt)])
        slots.step(1)
        assert slots.cache.keys.any()
        slots.clear(0)
        assert not slots.cache.keys.any() and not slots.cache.values.any()


def test_what_a_row_held_spoils_no_other(assistant):
    """Keys and values that are not finite, behind a shorter conversation that took their slot."""
    prompts = sorted(mixed(assistant, 6), key=lambda prompt: -len(prompt.ids))
    with engine_of(assistant, max_batch=3, prefix_bytes=0) as engine:
        first, *others = [engine.submit(prompts[i], GREEDY) for i in (0, 4, 5)]
        engine.advance()
        with torch.inference_mode():
            for tensor in engine.slots.cache.tensors:
                tensor[:, 0, : len(prompts[0].ids)] = float("nan")
        first.cancel()
        others += [engine.submit(prompts[i], GREEDY) for i in (1, 5)]
        for request, i in zip(others, (4, 5, 1, 5), strict=True):
            assert request.result().ids == alone(assistant.model, prompts[i], GREEDY).ids


def test_an_engine_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    pytest.importorskip("triton")
    model = fresh()
    norm = model.language_model.model.norm
    before = norm.rms_norm_op

    def full(*words, **options):
        raise torch.OutOfMemoryError("no memory for so many slots")

    monkeypatch.setattr("qwen2audio_core.engine.Slots", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(model, backend="triton")
    assert norm.rms_norm_op is before


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graphs_write_what_generate_writes(assistant):
    model = fresh().cuda()
    prompts = mixed(assistant, 12)
    with Engine(model, max_batch=5, max_tokens=1024) as engine:
        answers = engine.generate(prompts, GREEDY)
        assert engine.slots.recordings.made and engine.slots.encode.recordings.made
        drawn = [engine.submit(prompts[0], DRAWN, seed=3).result().ids for _ in range(2)]
    assert drawn[0] == drawn[1]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == alone(assistant.model, prompt, GREEDY).ids


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_are_batch_invariant(assistant, dtype):
    model = fresh(dtype).cuda()
    prompts = mixed(assistant, 5)
    import qwen2audio_kernels

    with torch.inference_mode():

        def answered(chosen, count):
            slots = Slots(
                model, count, 1024, kernels=qwen2audio_kernels, deterministic=True,
                record=record_graph(torch.device("cuda")),
            )  # fmt: skip
            return [ids for ids, _ in run_to_end_ids(slots, [job_of(prompts[i]) for i in chosen])]

        reference = [answered([i], 1)[0] for i in range(5)]
        assert answered([3, 1, 0, 4, 2], 5) == [reference[i] for i in (3, 1, 0, 4, 2)]
        assert answered([2, 4], 2) == [reference[2], reference[4]]


def run_to_end_ids(slots, jobs):
    slots.step = watch(slots)
    return run_to_end(slots, jobs)


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [None, "int8", "int4"])
def test_kernels_that_overlap_change_no_bit(monkeypatch, assistant, quantised):
    """Steps of kernels that start before the one in front has ended, and of ones that do not."""
    from qwen2audio_kernels import _launch

    model = load("random", device="cuda", dtype=torch.bfloat16, quantize=quantised).model
    prompts = mixed(assistant, 6)

    def answered():
        found = []
        slots = Slots(
            model, 6, 1024, kernels=backends.triton_kernels(),
            record=record_graph(torch.device("cuda")),
        )  # fmt: skip
        with torch.inference_mode():
            for _ in range(20):
                jobs = [job_of(prompt, DRAWN, seed=3) for prompt in prompts]
                found.append([ids for ids, _ in run_to_end_ids(slots, jobs)])
                for row in range(6):
                    slots.clear(row)
        return found

    together = answered()
    monkeypatch.setattr(_launch, "OVERLAPPING", False)
    apart = answered()
    assert together == apart
    assert all(ids == together[0] for ids in together)


# --- models that were changed ---------------------------------------------------------------------


def own_forward(module):
    """A module of the same weights whose forward is another."""
    kind = type(module)

    class Changed(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module.__class__ = Changed


@pytest.mark.parametrize(
    "part",
    [
        lambda m: m,
        lambda m: m.language_model.model,
        lambda m: m.language_model.model.layers[1],
        lambda m: m.language_model.model.layers[0].self_attn,
        lambda m: m.language_model.model.layers[1].mlp,
        lambda m: m.audio_tower,
        lambda m: m.audio_tower.layers[0],
        lambda m: m.audio_tower.layers[1].self_attn,
    ],
)
def test_a_forward_that_would_be_passed_over_is_refused(part):
    model = fresh()
    own_forward(part(model))
    with pytest.raises(InputError, match=r"does not call Changed.forward, which is not \w+'s"):
        Engine(model, worker=False)


def test_an_attention_that_would_be_passed_over_is_refused(assistant):
    model = fresh()

    def mine(q, k, v, causal=False, key_start=None, key_end=None):
        return ops.attention(q, k, v, causal, key_start, key_end) * 2

    own = backends.use(model, attention=mine, layers="language_model.model.layers.1")
    with own, pytest.raises(InputError, match="attention of its own"):
        Engine(model, worker=False)
    prompt = mixed(assistant, 3)[2]
    for choice in ({"attention": "eager"}, {"attention": mine, "layers": "audio_tower"}):
        with backends.use(model, **choice), Engine(model, worker=False) as engine:  # it calls these
            ids = engine.submit(prompt, GREEDY).result().ids
        with backends.use(model, **choice):
            assert ids == generate(model, chat.collate([prompt], 0), GREEDY)[0].ids
    model.language_model.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(InputError, match=r"Identity\.forward"):
        Engine(model, worker=False)


@pytest.mark.parametrize("recorded", [False, True])
def test_clips_that_pool_to_another_length_are_an_error(assistant, monkeypatch, recorded):
    """Not the rows of the first part of a clip."""
    model = fresh()
    prompt = next(one for one in mixed(assistant, 9) if one.clips)
    monkeypatch.setattr("qwen2audio_core.encoder.F.avg_pool1d", lambda x, **_: x)
    with (
        Engine(model, worker=False) as engine,
        pytest.raises(PromptError, match="the clips need"),
    ):
        if recorded:
            prompt = next(one for one in mixed(assistant, 9) if len(one.clips) == 1)
            engine.slots = Slots(model, 8, 2048, kernels=PLAIN, record=tape.record)
        engine.submit(prompt, GREEDY).result()
