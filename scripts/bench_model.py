"""Race this package against transformers on one machine, stage by stage, in one run.

python scripts/bench_model.py --peer transformers --device cpu
python scripts/bench_model.py --shapes tiny --stages log_mel_3s,decode_b1 --json out.json
python scripts/bench_model.py --stages engine_b1,engine_b8,deterministic_b8    ours against ours
python scripts/bench_model.py --device cuda --json out.json --plot out.png     the grid of a GPU

Both arms get the same random checkpoint, dtype, threads, waveforms and prompts; the peer runs with
sdpa and with the key-value cache that is fastest here. Before a stage is timed, its results must
agree, and the difference stands next to the speed; where they do not, no speed is printed and the
exit code is 1. Runs alternate (ours, peer, peer, ours, ...). A ratio is the peer's median time over
ours, so above 1 we are faster; low and high are the 95 % bootstrap interval of that ratio.

log_mel   waveform to log-mel                     the peer's feature extractor pads to 30 s
encoder   log-mel to audio states                 the peer's encoder runs on all 30 s
ttft      waveform and text to the first token    processor and generate(max_new_tokens=1)
decode    seconds for one token in each row       tokens 8 to 40 after a text, greedy, no early end
          _engine: by engine.py. _int8, _int4: by engine.py with a quantised language model, which
          must agree with generate.py's on the same codes; `error` is that to the peer, and
          `accuracy` compares 32 tokens after each of four prompts with those of our own model
          before it was quantised. Random weights make all words nearly equally likely, so that
          the share of equal tokens is a floor; --checkpoint names a trained model
load      folder to a model, in a fresh process   every page of the weights touched on both sides;
                                                  peak: the most resident memory of the whole
                                                  process, and how much more than before the load;
                                                  anonymous: what of it belongs to no file, so that
                                                  the system cannot drop it
import    start of a process that can answer      peer: the model's class and the processor's; ours:
                                                  all public names and the help of the command line

Of the stages that are run only by name both arms are ours, so a ratio is

engine_b1, engine_b8, engine_ttft_3s    generate.py's time over engine.py's, as `load` gives a model
engine_int8, engine_int4                the same at batch 1 with a quantised language model
deterministic_b8                        engine.py's time over its time with deterministic=True
int8_cache_b8                           engine.py's time over its time with int8_cache=True

The floor is what the counted operations or bytes would take at the speed that this machine reaches
in one large product, and in reading.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import bench_grid
import torch
from bench_grid import SHAPES, WORSE, forced_logits
from torch import Tensor

from qwen2audio_core import chat, quantize, tiny, weights
from qwen2audio_core.assistant import load, user_turn
from qwen2audio_core.compare import TOLERANCE, measure
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.engine import Engine
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SAMPLE_RATE, clip_lengths, log_mel
from qwen2audio_core.generate import Generation
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer

STAGES = (
    *("log_mel_3s", "log_mel_30s", "encoder_3s", "encoder_10s", "encoder_30s"),
    *("ttft_3s", "decode_b1", "decode_b8", "load", "import"),
    *("decode_b1_engine", "decode_b1_int8", "decode_b1_int4"),
)
OWN_STAGES = (
    *("engine_b1", "engine_b8", "engine_ttft_3s", "engine_int8", "engine_int4"),
    *("deterministic_b8", "int8_cache_b8"),
)
QUESTION = "What does the person say, and what else can be heard?"
FIRST, LAST = 8, 40  # new tokens between which decoding is timed
LOG_MEL_LIMIT = 2e-5  # largest difference between the two log-mels, absolute


@dataclass
class Race:
    """One stage, ready to run. Each arm runs once and returns its seconds."""

    ours: Callable[[], float]
    theirs: Callable[[], float]
    error: float  # difference of the two results, already measured
    limit: float  # of `gap`
    floor: float | None = None  # seconds
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    gap: float | None = None  # what must be small; None for the error itself


class Bench:
    """The checkpoint in both arms, and what every stage needs of them."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, threads: int):
        self.folder, self.device, self.dtype, self.threads = folder, device, dtype, threads
        self.tokenizer = Tokenizer.from_folder(folder)
        self.config = Qwen2AudioConfig.from_json(folder / "config.json")
        published = weights.read_settings(folder)
        self.settings = Settings(
            max_new_tokens=LAST + 1,
            min_new_tokens=LAST + 1,
            repetition_penalty=published.repetition_penalty,
            eos_token_ids=published.eos_token_ids,
            pad_token_id=published.pad_token_id,
        )

    @cached_property
    def ours(self) -> Any:
        return load(str(self.folder), self.device, self.dtype).model  # as a user gets it

    @cached_property
    def quantised(self) -> dict[str, Any]:
        return {name: self._quantised(name) for name in ("int8", "int4")}

    def _quantised(self, name: str) -> Any:
        return load(str(self.folder), self.device, self.dtype, quantize=name).model

    @cached_property
    def reference(self) -> list[quantize.Answered]:
        """What our own model answers to two texts and two clips, for a quantised one to match."""
        prompts: list[dict[str, Any]] = []
        for text in (QUESTION, QUESTION * 9):
            prompt = chat.encode([user_turn(text)], self.tokenizer)
            prompts.append({"ids": torch.tensor([prompt.ids], device=self.device)})
        for seed, seconds in ((1, 1.5), (2, 3.0)):
            batch = self.batch([waveform(seconds, seed)])
            clips = {"mel": batch.mel, "conv_frames": batch.conv_frames}
            prompts.append({"ids": batch.ids, **clips})
        return quantize.answer(self.ours, prompts, 32)

    @cached_property
    def theirs(self) -> Any:
        from transformers import Qwen2AudioForConditionalGeneration as Reference

        model = Reference.from_pretrained(self.folder, dtype=self.dtype, attn_implementation="sdpa")
        return model.to(self.device).eval()

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.folder)
        processor.tokenizer.padding_side = "left"
        return processor

    @cached_property
    def flops(self) -> float:
        """Operations per second of one large product in this dtype."""
        a = torch.randn(2048, 2048, device=self.device).to(self.dtype)
        return 2 * 2048**3 / min(self.seconds(lambda: a @ a) for _ in range(7))

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of reading 1 GiB."""
        x = torch.randn(2**28, device=self.device)
        return 2**30 / min(self.seconds(lambda: x.sum()) for _ in range(5))

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def prompt(self, waveform: Tensor) -> chat.Prompt:
        return chat.encode([user_turn(QUESTION, (waveform, SAMPLE_RATE))], self.tokenizer)

    def batch(self, waveforms: list[Tensor]) -> chat.Batch:
        bins = self.config.audio.num_mel_bins
        prompts = [self.prompt(waveform) for waveform in waveforms]
        pad = self.settings.pad_token_id
        return chat.collate(prompts, pad, device=self.device, num_mel_bins=bins)

    def their_inputs(self, waveforms: list[Tensor]) -> Any:
        turn = [{"type": "audio", "audio": ""}, {"type": "text", "text": QUESTION}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        return self.processor(
            text=[text] * len(waveforms),
            audio=[waveform.numpy() for waveform in waveforms],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding=True,
        ).to(self.device)

    def linear_weights(self, part: str) -> int:
        """Numbers in the matrices that every position of a part is multiplied with."""
        names = self.ours.state_dict().items()
        return sum(
            tensor.numel()
            for name, tensor in names
            if name.startswith(part) and tensor.ndim == 2 and "embed" not in name
        )


def waveform(seconds: float, seed: int = 0) -> Tensor:
    """Noise; no stage's time depends on what is heard."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(round(seconds * SAMPLE_RATE), generator=generator) * 0.1


def log_mel_stage(bench: Bench, seconds: int) -> Race:
    clip = waveform(seconds)
    bins = bench.config.audio.num_mel_bins
    extractor = bench.processor.feature_extractor

    def theirs() -> Tensor:
        return extractor(
            [clip.numpy()],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="max_length",
            return_attention_mask=True,
        )["input_features"][0]

    mine = log_mel(clip, bins)
    error = measure("log-mel", mine, theirs()[:, : mine.shape[1]]).largest
    return Race(
        lambda: bench.seconds(lambda: log_mel(clip, bins)),
        lambda: bench.seconds(theirs),
        error,
        LOG_MEL_LIMIT,
    )


def encoder_stage(bench: Bench, seconds: int) -> Race:
    clip = waveform(seconds)
    batch = bench.batch([clip])
    ours, tower = bench.ours.audio_tower, _part(bench.theirs, "audio_tower")
    call: dict[str, Any] = {}

    # The mask depends on the release: take the arguments that the model itself gives its encoder.
    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.update(args=args, kwargs=kwargs)

    handle = tower.register_forward_pre_hook(record, with_kwargs=True)
    bench.theirs(**bench.their_inputs([clip]))
    handle.remove()

    def theirs() -> Tensor:
        return tower(*call["args"], **call["kwargs"]).last_hidden_state

    mine = ours(batch.mel, batch.conv_frames)
    lengths = clip_lengths(len(clip))
    error = measure("audio states", mine, theirs()[:, : lengths.audio_tokens]).relative
    return Race(
        lambda: bench.seconds(lambda: ours(batch.mel, batch.conv_frames)),
        lambda: bench.seconds(theirs),
        error,
        TOLERANCE[bench.dtype],
        encoder_operations(bench, lengths.conv_frames) / bench.flops,
    )


def ttft_stage(bench: Bench, seconds: int) -> Race:
    clip = waveform(seconds)
    settings = bench.settings
    batch = bench.batch([clip])
    mine = Generation(bench.ours, batch, settings).logits
    inputs = bench.their_inputs([clip])
    error = measure("logits", mine, bench.theirs(**inputs).logits[:, -1]).relative

    def ours() -> None:
        Generation(bench.ours, bench.batch([clip]), settings).step()

    def theirs() -> None:
        inputs = bench.their_inputs([clip])
        bench.theirs.generate(**inputs, do_sample=False, max_new_tokens=1)

    operations = encoder_operations(bench, clip_lengths(len(clip)).conv_frames)
    prefill = 2 * bench.linear_weights("language_model.model.layers") * batch.ids.shape[1]
    head = bench.linear_weights("language_model.lm_head") * bench.dtype.itemsize
    return Race(
        lambda: bench.seconds(ours),
        lambda: bench.seconds(theirs),
        error,
        TOLERANCE[bench.dtype],
        (operations + prefill) / bench.flops + head / bench.bandwidth,
    )


def decode_prompts(bench: Bench, rows: int) -> list[chat.Prompt]:
    """Texts of unequal length: the peer would spend the run on its encoder, not timed here."""
    questions = [" ".join([QUESTION] * (9 - row)) for row in range(rows)]
    return [chat.encode([user_turn(text)], bench.tokenizer) for text in questions]


def engine_for(bench: Bench, model: Any, rows: int, **options: Any) -> Engine:
    """Without a thread of its own, and with room for `rows` of decode_prompts or of 3 s clips."""
    longest = max(len(prompt.ids) for prompt in decode_prompts(bench, rows))
    tokens = max(longest, 256) + LAST + 1
    return Engine(
        model, max_batch=rows, max_tokens=tokens, prefix_bytes=0, prefill_tokens=10**6,
        worker=False, **options,
    )  # fmt: skip


def engine_decodes(bench: Bench, engine: Engine, prompts: list[chat.Prompt]) -> float:
    """Seconds of one step, tokens FIRST to LAST of every prompt."""
    requests = [engine.submit(prompt, bench.settings) for prompt in prompts]
    while any(len(request.ids) <= FIRST for request in requests):
        engine.advance()
    seconds = bench.seconds(lambda: [engine.advance() for _ in range(LAST - FIRST)])
    for request in requests:
        request.cancel()
    engine.advance()
    return seconds / (LAST - FIRST)


def generate_decodes(bench: Bench, model: Any, batch: chat.Batch) -> float:
    """The same by generate.py."""
    run = Generation(model, batch, bench.settings)
    for _ in range(FIRST + 1):
        run.step()
    seconds = bench.seconds(lambda: [run.step() for _ in range(LAST - FIRST)])
    return seconds / (LAST - FIRST)


def decode_stage(bench: Bench, rows: int, arm: str = "") -> Race:
    """arm: "" for generate.py; "engine", or "int8" and "int4" in the engine."""
    from transformers.generation.streamers import BaseStreamer

    class Stamps(BaseStreamer):
        """The time at which each step's tokens were handed out; the first call is the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    prompts = decode_prompts(bench, rows)
    batch = chat.collate(prompts, bench.settings.pad_token_id, device=bench.device)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}

    def generate(cache: str | None) -> tuple[Tensor, float]:
        stamps = Stamps()
        ids = bench.theirs.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=LAST + 1,
            min_new_tokens=LAST + 1,
            cache_implementation=cache,
            streamer=stamps,
        )
        times = stamps.times[1:]
        return ids, (times[LAST] - times[FIRST]) / (LAST - FIRST)

    modes = {"dynamic": None, "static": "static"}
    speeds = {name: min(generate(mode)[1] for _ in range(2)) for name, mode in modes.items()}
    best = min(speeds, key=lambda name: speeds[name])

    # The same tokens into both: ours one by one through the cache, the peer's in one pass without.
    written = generate(modes[best])[0][:, batch.ids.shape[1] :]
    mask = torch.cat((batch.attention_mask, torch.ones_like(written[:, :FIRST])), dim=1)
    full = {
        "input_ids": torch.cat((batch.ids, written[:, :FIRST]), dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    theirs = bench.theirs(**full).logits[:, -1]
    model = bench.quantised[arm] if arm in ("int8", "int4") else bench.ours
    engine = engine_for(bench, model, rows) if arm else None  # which may put codes in order
    plain = through_cache(model, batch, written[:, :FIRST])
    extra = {"peer_cache": best, "peer_caches_s": speeds, "rows": rows}
    note, gap = f"{best} cache", None
    if engine is not None:
        logits = forced_logits(engine.slots, prompts, written[:, :FIRST])[:, -1]
        ours = partial(engine_decodes, bench, engine, prompts)
    else:
        logits = plain
        ours = partial(generate_decodes, bench, model, batch)
    error = measure("logits", logits, theirs).relative
    if arm in ("int8", "int4"):
        gap = measure("logits", logits, plain).relative
        found = quantize.accuracy(model, bench.reference)
        extra["accuracy"] = asdict(found)
        note += (
            f"; logits off by {found.relative_rms:.1%} rms, {found.agreement:.0%} of tokens equal"
        )
    return Race(
        ours,
        lambda: generate(modes[best])[1],
        error,
        TOLERANCE[bench.dtype],
        step_bytes(bench, model) / bench.bandwidth,
        note,
        extra,
        gap,
    )


def through_cache(model: Any, batch: chat.Batch, written: Tensor) -> Tensor:
    """Logits (B, V) behind a prompt and the ids (B, n), which go in one by one."""
    settings = Settings(max_new_tokens=written.shape[1] + 1, eos_token_ids=())
    run = Generation(model, batch, settings)
    embed = model.language_model.model.embed_tokens
    for step in range(written.shape[1]):
        logits = model.decode(embed(written[:, step : step + 1]), cache=run.cache)
    return logits[:, -1]


def step_bytes(bench: Bench, model: Any) -> int:
    """What a decoding step reads of the weights: codes and scales, or the linear layers."""
    codes = quantize.code_names(model)
    state = model.state_dict()
    if codes:
        return sum(state[name].nbytes for name in codes)
    return bench.linear_weights("language_model") * bench.dtype.itemsize


def own_stage(bench: Bench, stage: str) -> Race:
    """Ours against ours, see the top of this file."""
    kind, _, size = stage.partition("_")
    if stage == "engine_ttft_3s":
        clip = waveform(3)
        prompt, batch = bench.prompt(clip), bench.batch([clip])
        engine = engine_for(bench, bench.ours, 1)

        def first_token() -> float:
            times: list[float] = []
            began = time.perf_counter()
            request = engine.submit(
                bench.prompt(clip),
                bench.settings,
                on_token=lambda _: times.append(time.perf_counter()),
            )
            engine.advance()
            request.cancel()
            engine.advance()
            return times[0] - began

        first = Generation(bench.ours, batch, bench.settings).logits
        error = measure(
            "logits", forced_logits(engine.slots, [prompt], batch.ids[:, :0])[:, 0], first
        )
        return Race(
            first_token,
            lambda: bench.seconds(
                lambda: Generation(bench.ours, bench.batch([clip]), bench.settings).step()
            ),
            error.relative,
            TOLERANCE[bench.dtype],
        )
    model = bench.quantised[size] if size in ("int8", "int4") else bench.ours
    rows = 8 if size.endswith("b8") else 1
    prompts = decode_prompts(bench, rows)
    batch = chat.collate(prompts, bench.settings.pad_token_id, device=bench.device)
    engine = engine_for(bench, model, rows)
    written = torch.randint(0, bench.config.text.vocab_size, (rows, FIRST), device=bench.device)
    expected = forced_logits(engine.slots, prompts, written)[:, -1]
    limit = TOLERANCE[bench.dtype]
    if kind == "engine":
        mine, other = engine, partial(generate_decodes, bench, model, batch)
        found = through_cache(model, batch, written)
    else:
        options = {"deterministic": True} if kind == "deterministic" else {"int8_cache": True}
        limit = limit if kind == "deterministic" else WORSE["int8_cache"]
        mine = engine_for(bench, model, rows, **options)
        other = partial(engine_decodes, bench, engine, prompts)
        found = forced_logits(mine.slots, prompts, written)[:, -1]
    rms = float((found - expected).float().norm() / expected.float().norm())
    return Race(
        partial(engine_decodes, bench, mine, prompts),
        other,
        measure("logits", found, expected).relative,
        limit,
        step_bytes(bench, model) / bench.bandwidth,
        f"logits off by {rms:.2%} rms",
        {"relative_rms": rms},
    )


LOAD = """
import json, os, re, resource, sys, time
import torch
folder, small, threads, arm = sys.argv[1:]
torch.set_num_threads(int(threads))
if arm == "ours":
    from qwen2audio_core.weights import load_model as load
else:
    import transformers
    transformers.utils.logging.disable_progress_bar()
    def load(folder):
        return transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype="auto")

def memory():
    # Bytes: the most that was resident, and what of the memory now is anonymous. Not ru_maxrss,
    # which a process inherits from its parent.
    if os.path.exists("/proc/self/status"):
        status = open("/proc/self/status").read()
        sizes = dict(re.findall(r"(\\w+):\\s+(\\d+) kB", status))
        return [int(sizes.get(name, 0)) * 1024 for name in ("VmHWM", "RssAnon")]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0

load(small)  # so that what is imported on first use is there
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
except OSError:
    pass
before, anonymous_before = memory()
began = time.perf_counter()
model = load(folder)
ready = time.perf_counter()
tensors = [tensor.detach().view(-1).view(torch.uint8) for tensor in model.state_dict().values()]
for tensor in tensors:
    tensor[::4096].sum()
touched = time.perf_counter()
top, anonymous = memory()
check = sum(int(tensor.view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors)
size = sum(tensor.numel() for tensor in tensors)
print(json.dumps({"ready": ready - began, "touched": touched - began, "check": check,
                  "peak": top - before, "process_peak": top, "bytes": size,
                  "anonymous": anonymous, "anonymous_more": anonymous - anonymous_before}))
"""


def load_stage(bench: Bench, small: Path) -> Race:
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}

    def load(arm: str) -> float:
        words = [str(bench.folder), str(small), str(bench.threads), arm]
        runs[arm].append(json.loads(_process("-c", LOAD, *words).splitlines()[-1]))
        return runs[arm][-1]["touched"]

    load("ours"), load("theirs")  # the files are in the system's cache from here on
    ours, theirs = runs["ours"].pop(), runs["theirs"].pop()
    same = all(ours[key] == theirs[key] for key in ("check", "bytes"))
    extra: dict[str, Any] = {"bytes": ours["bytes"]}
    for name, one in (("ours", ours), ("peer", theirs)):
        for kind in ("peak", "process_peak", "anonymous", "anonymous_more"):
            extra[f"{name}_{kind}_bytes"] = one[kind]
    note = "peak {:.0f} and {:.0f} MB ({:.2f} and {:.2f} of the weights more than before)".format(
        *(one["process_peak"] / 1e6 for one in (ours, theirs)),
        *(one["peak"] / one["bytes"] for one in (ours, theirs)),
    )
    note += ", anonymous {:.0f} and {:.0f} MB".format(
        *(one["anonymous"] / 1e6 for one in (ours, theirs))
    )
    race = Race(
        lambda: load("ours"),
        lambda: load("theirs"),
        0.0 if same else float("inf"),
        0.0,
        ours["bytes"] / bench.bandwidth,
        note,
        extra,
    )
    extra["untouched"] = runs  # replaced by medians in the result
    return race


OUR_IMPORT = """
import sys
import qwen2audio_core as package
for name in package.__all__:
    getattr(package, name)
from qwen2audio_core.cli import main
sys.argv = ["qwen2audio", "--help"]
main()
"""
THEIR_IMPORT = """
import transformers
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
"""


def import_stage(bench: Bench) -> Race:
    def ours() -> float:
        return bench.seconds(lambda: _process("-c", OUR_IMPORT))

    def theirs() -> float:
        return bench.seconds(lambda: _process("-c", THEIR_IMPORT))

    ours(), theirs()  # compiled files are written and cached from here on
    alone = [bench.seconds(lambda: _process("-m", "qwen2audio_core.cli", "--help"))]
    alone.append(bench.seconds(lambda: _process("-c", "import qwen2audio_core")))
    torch_alone = bench.seconds(lambda: _process("-c", "import torch"))
    extra = {"help_s": alone[0], "package_s": alone[1], "torch_s": torch_alone}
    note = f"help alone {alone[0]:.2f} s, torch alone {torch_alone:.2f} s"
    return Race(ours, theirs, 0.0, 0.0, None, note, extra)


def encoder_operations(bench: Bench, frames: int) -> float:
    """Multiplications and additions of the encoder over so many frames of 20 ms."""
    audio = bench.config.audio
    width, layers = audio.d_model, audio.encoder_layers
    linear = 2 * frames * bench.linear_weights("audio_tower.layers")
    attention = 4 * frames * frames * width * layers
    convolutions = 2 * 3 * (2 * frames * audio.num_mel_bins * width + frames * width * width)
    return linear + attention + convolutions


def prepare(bench: Bench, stage: str, small: Path) -> Race:
    kind, _, size = stage.rpartition("_")
    if kind == "log_mel":
        return log_mel_stage(bench, int(size[:-1]))
    if kind == "encoder":
        return encoder_stage(bench, int(size[:-1]))
    if kind == "ttft":
        return ttft_stage(bench, int(size[:-1]))
    if stage in OWN_STAGES:
        return own_stage(bench, stage)
    if stage.startswith("decode"):
        _, size, arm = f"{stage}_".split("_")[:3]
        return decode_stage(bench, int(size[1:]), arm)
    return load_stage(bench, small) if stage == "load" else import_stage(bench)


def alternate(race: Race, repeats: int) -> list[tuple[float, float]]:
    """Seconds of both arms, run in the order ours, peer, peer, ours, and so on."""
    pairs = []
    for i in range(repeats):
        if i % 2:
            theirs = race.theirs()
            pairs.append((race.ours(), theirs))
        else:
            ours = race.ours()
            pairs.append((ours, race.theirs()))
    return pairs


def spread(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Ratio of the medians, and the 95 % interval of that ratio over 2,000 resamplings of pairs."""

    def ratio(sample: list[tuple[float, float]]) -> float:
        return statistics.median(b for _, b in sample) / statistics.median(a for a, _ in sample)

    draw = random.Random(0)
    ratios = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {
        "ratio": ratio(pairs),
        "low": ratios[50],
        "high": ratios[-51],
        "ours_s": statistics.median(a for a, _ in pairs),
        "peer_s": statistics.median(b for _, b in pairs),
    }


def measured(bench: Bench, stage: str, small: Path, repeats: int) -> dict[str, Any]:
    """One stage's entry of the JSON; {"refused": why} where the arms disagree."""
    race = prepare(bench, stage, small)
    gap = race.error if race.gap is None else race.gap
    if not gap <= race.limit:
        return {"refused": f"the arms differ by {gap:.2e}, allowed are {race.limit:.0e}"}
    for _ in range(0 if stage in ("load", "import") else 3):
        race.ours(), race.theirs()
    # Short stages cost nothing to repeat and need it most.
    count = 4 * repeats if stage.startswith(("log_mel", "encoder", "ttft")) else repeats
    result = spread(alternate(race, count)) | {"error": race.error, "repeats": count}
    result |= {"floor_s": race.floor, "note": race.note} | race.extra
    if stage == "load":
        runs = result.pop("untouched")
        for arm, key in (("ours", "ours_untouched_s"), ("theirs", "peer_untouched_s")):
            result[key] = statistics.median(run["ready"] for run in runs[arm])
    return result


def machine(bench: Bench, shapes: str) -> dict[str, Any]:
    import transformers

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    if bench.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": bench.threads,
        "device": bench.device,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "shapes": shapes,
        "parameters": sum(tensor.numel() for tensor in bench.ours.state_dict().values()),
        "tokenizer_size": len(bench.tokenizer),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "product_gflops": bench.flops / 1e9,
        "read_gbytes_per_s": bench.bandwidth / 1e9,
        "interval": "95 % bootstrap of the ratio of medians",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=("transformers",), default="transformers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--shapes",
        help=f"{', '.join(SHAPES)}, or a config.json; default middle, for the grid official",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where it is computed"
    )
    parser.add_argument("--stages", help="comma-separated; default all but ours against ours")
    parser.add_argument(
        "--grid", action="store_true", help="the default on a GPU, see bench_grid.py"
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="instead of random weights")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of a slow stage, default 9")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the published one if at hand")
    parser.add_argument("--json", metavar="FILE")
    bench_grid.arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.grid or (args.device.startswith("cuda") and not args.stages):
            args.shapes = args.shapes or "official"
            return bench_grid.grid(args)
        args.shapes = args.shapes or "middle"
        stages = (args.stages or ",".join(STAGES)).split(",")
        wrong = [stage for stage in stages if stage not in (*STAGES, *OWN_STAGES)]
        if wrong:
            known = ", ".join((*STAGES, *OWN_STAGES))
            raise InputError(f"no stage {wrong[0]!r}; there are {known}")
        if args.repeats < 1:
            raise InputError(f"--repeats is {args.repeats}, it must be at least 1")
        config = SHAPES.get(args.shapes) or Qwen2AudioConfig.from_json(args.shapes)
        try:
            import transformers
        except ImportError as error:
            raise InputError("the peer is not installed: pip install transformers") from error
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(args.threads)
        dtype = getattr(torch, args.dtype) if args.dtype else best_dtype(args.device)
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            results = race_all(args, stages, config, dtype, Path(temporary))
    except InputError as error:
        print(f"bench_model: {error}", file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any("refused" in results[stage] for stage in stages) else 0


def race_all(
    args: argparse.Namespace,
    stages: list[str],
    config: Qwen2AudioConfig,
    dtype: torch.dtype,
    temporary: Path,
) -> dict[str, Any]:
    tokenizer = args.tokenizer
    official = Path(__file__).resolve().parents[2] / "shared" / "official"
    if tokenizer is None and official.is_dir() and config.text.vocab_size >= 154_931:
        tokenizer = official
    folder = Path(args.checkpoint or temporary / "model")
    if not args.checkpoint:
        tiny.write_random(folder, config, dtype=dtype, tokenizer=tokenizer)
    tiny.write_random(temporary / "small", dtype=dtype)
    bench = Bench(folder, args.device, dtype, args.threads)
    results: dict[str, Any] = {"machine": machine(bench, args.shapes)}
    print(", ".join(f"{key} {_short(value)}" for key, value in results["machine"].items()))
    print(f"{'stage':17}{'ratio':>8}{'low':>8}{'high':>8}{'ours':>12}{'peer':>12}", end="")
    print(f"{'floor':>12}{'error':>10}  note")
    for stage in stages:
        result = results[stage] = measured(bench, stage, temporary / "small", args.repeats)
        print(row(stage, result), flush=True)
    return results


def row(stage: str, result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"{stage:17}  REFUSED: {result['refused']}"
    ratios = "".join(f"{result[key]:8.2f}" for key in ("ratio", "low", "high"))
    times = "".join(f"{_milli(result[key]):>12}" for key in ("ours_s", "peer_s", "floor_s"))
    return f"{stage:17}{ratios}{times}{result['error']:10.1e}  {result['note']}"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies in it; elsewhere it is emulated and slower."""
    if device == "cpu":
        fast = torch.backends.mkldnn.is_available() and _cpu_has("avx512_bf16", "amx_bf16", "bf16")
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def _cpu_has(*flags: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(set(info.read_text().split()) & set(flags))


def _part(model: Any, name: str) -> Any:
    """A part of the peer's model, whose tree depends on its release."""
    return getattr(model, name, None) or getattr(model.model, name)


def _process(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"a process of the benchmark failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def _milli(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.2f} ms"


def _short(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
