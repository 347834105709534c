"""Answer clips of several lengths, alone and in batches, with every arm, and set each stage beside
what the machine allows. What `bench_model.py --device cuda` runs.

python scripts/bench_grid.py --device cuda --json out.json --plot out.png
python scripts/bench_grid.py --device cpu --shapes tiny --quick    the same code at small shapes

1. Ceilings: GB/s of reading 4 GiB and of copying, TFLOP/s of a bfloat16 product (bench.py's).
2. Random weights of the shape, made on the device. All arms share them; transformers too.
3. A float32 copy answers some prompts of each length, alone, once: the reference of every arm's
   error. It is given away before anything is timed.
4. Every arm's turn at every length and batch, until the budget is spent: first what the targets
   ask for, then the rest, then all once more backwards. Each is warmed up and then timed from the
   waveforms on. Greedy, no end, as many tokens each. A wrong arm (below) gets no speed.

eager, sdpa     transformers with its dynamic cache and that attention
compiled        transformers with sdpa, static cache and its own torch.compile; in the first cell
                and round alone, for every shape is compiled anew, and that takes minutes
plain           generate.py
engine          engine.py: on a GPU packed weights, Triton's kernels and CUDA graphs
int8, int4      the engine with a quantised language model
int8_cache      the engine with keys and values in int8

mel, encoder, prefill   stages of the prompts' pass, apart, from a run of their own
ttft    seconds until every answer has its first token       tpot   seconds of each further one
of_floor   the counted floor over the time: operations at the product's speed, or bytes at the
        reading speed, whichever takes longer; a step reads the weights, and keys and values once
error   rms of the logits' difference from float32's over theirs, for the cell's prompts and forced
        tokens behind them, in the worst of the rows that were looked at, the first and the last
        among them; allowed is twice transformers' own (sdpa), plus WORSE of a quantised arm
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core import chat, gpu, packed_encoder, packing, quantize, tiny, weights
from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.engine import Engine
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import MAX_SAMPLES, SAMPLE_RATE, clip_lengths
from qwen2audio_core.generate import Generation
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.quantize import SCHEMES
from qwen2audio_core.sampling import Settings
from qwen2audio_core.slots import Job, Slots

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = Qwen2AudioConfig(
    AudioConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048),
    TextConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    ),
)
SHAPES = {"middle": MIDDLE, "tiny": tiny.TINY, "official": Qwen2AudioConfig()}
ARMS = ("eager", "sdpa", "compiled", "plain", "engine", "int8", "int4", "int8_cache")
# (seconds of audio, batch), the most telling first: a budget may end the list early.
CELLS = ((3, 1), (30, 1), (30, 32), (3, 32), (10, 1), (30, 8), (3, 8), (10, 32), (10, 8))
COMPILING = 60.0  # s that torch.compile takes at least
TEXT = 50  # ids around each clip's places
FORCED = 4  # tokens behind the prompt at which logits are compared
WORSE = {"int8": 0.05, "int4": 0.5, "int8_cache": 0.05}  # a broken kernel is off by more than 1
# What issue 3 asks of an H200: (figure, seconds, batch, arm, smallest or largest value).
TARGETS = (
    ("tokens_per_s", 3, 1, "engine", ">=", 250),
    ("tokens_per_s", 3, 1, "int8", ">=", 400),
    ("tokens_per_s", 3, 1, "int4", ">=", 550),
    ("tokens_per_s", 30, 32, "engine", ">=", 3000),
    ("of_floor.tpot", 3, 1, "engine", ">=", 0.85),
    ("encoder", 30, 1, "engine", "<=", 4e-3),
    ("encoder", 3, 1, "engine", "<=", 0.6e-3),
    ("prefill", 30, 1, "engine", "<=", 17e-3),
    ("ttft", 3, 1, "engine", "<=", 8e-3),
)


@dataclass
class Plan:
    """What is to be run."""

    config: Qwen2AudioConfig
    device: torch.device
    dtype: torch.dtype
    cells: tuple[tuple[int, int], ...]
    arms: tuple[str, ...]
    new_tokens: int
    rounds: int  # times that all arms of a cell have their turn
    budget: float  # seconds for all of it
    quick: bool  # small ceilings, nothing compiled for real
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.began)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def now(self) -> float:
        self.wait()
        return time.perf_counter()


@dataclass
class Run:
    """An arm's answer to a batch. Seconds, and bytes beside what was there before."""

    ttft: float
    tpot: float
    stages: dict[str, float]  # mel, encoder, prefill; empty but for the run that takes them apart
    peak: int | None = None


# --- weights --------------------------------------------------------------------------------------


def random_model(config: Qwen2AudioConfig, device: torch.device, dtype: torch.dtype) -> Qwen2Audio:
    """Random weights, made where they are used, in the packed layout."""
    model = weights.without_storage(config)
    places = packing.room(model, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, place in places.items():
        place.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02, generator=generator)
    model.load_state_dict(places, strict=True, assign=True)
    return model.eval()


def quantised_twin(model: Qwen2Audio, scheme: quantize.Scheme) -> Qwen2Audio:
    """The same model with a quantised language model; all else is shared."""
    twin = weights.without_storage(model.config)
    paths = quantize.linear_paths(twin)
    quantize.lay_out(twin, paths, scheme)
    state = dict(model.state_dict())
    for path in paths:
        made = quantize.QuantizedLinear.from_weight(
            state.pop(f"{path}.weight"), bits=scheme.bits, group=scheme.group
        )
        state[f"{path}.qweight"], state[f"{path}.scales"] = made.stored()
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.eval()


def transformers_model(model: Qwen2Audio, attention: str) -> Any:
    """transformers' class around the very same tensors."""
    import transformers

    config = transformers.Qwen2AudioConfig(**model.config.to_json())
    config._attn_implementation = attention
    with torch.device("meta"):
        theirs = transformers.Qwen2AudioForConditionalGeneration(config)
    ours = model.state_dict()
    # Not every release has names that the published ones are a part of: ours know the way.
    state = {key: ours[weights.published_name(key)] for key in theirs.state_dict()}
    theirs.load_state_dict(state, strict=True, assign=True)
    rotary = [m for m in theirs.modules() if hasattr(m, "original_inv_freq")]
    for module in rotary:  # computed, not stored, and so still on the meta device
        fresh = type(module)(module.config)
        module.inv_freq = fresh.inv_freq.to(next(iter(ours.values())).device)
        module.original_inv_freq = module.inv_freq
    theirs.set_attn_implementation(attention)
    return theirs.eval()


# --- inputs ---------------------------------------------------------------------------------------


def prompts_of(config: Qwen2AudioConfig, seconds: int, batch: int) -> list[chat.Prompt]:
    """Different noise and words for every row; the same ones whatever the batch is."""
    prompts = []
    for row in range(batch):
        generator = torch.Generator().manual_seed(1000 * seconds + row)
        clip = torch.randn(seconds * SAMPLE_RATE, generator=generator) * 0.1
        held = clip_lengths(len(clip)).audio_tokens
        words = torch.randint(0, min(config.audio_token_id, 250), (TEXT,), generator=generator)
        ids = words.tolist()
        ids[TEXT // 2 : TEXT // 2] = [config.audio_token_id] * held
        prompts.append(chat.Prompt(ids, [clip], [held], []))
    return prompts


def forced_ids(config: Qwen2AudioConfig, seconds: int, batch: int) -> Tensor:
    """Ids (B, FORCED) to put behind the prompts; a row has the same ones whatever the batch is."""
    rows = []
    for row in range(batch):
        generator = torch.Generator().manual_seed(1000 * seconds + row)
        rows.append(torch.randint(0, config.text.vocab_size, (FORCED,), generator=generator))
    return torch.stack(rows)


def settings_for(new_tokens: int) -> Settings:
    return Settings(max_new_tokens=new_tokens, eos_token_ids=())


# --- ours -----------------------------------------------------------------------------------------


class Plain:
    """generate.py."""

    def __init__(self, plan: Plan, model: Qwen2Audio, prompts: list[chat.Prompt]):
        self.plan, self.model, self.prompts = plan, model, prompts

    def run(self, new_tokens: int) -> Run:
        began = self.plan.now()
        mels = self.model.config.audio.num_mel_bins
        batch = chat.collate(self.prompts, 0, device=self.plan.device, num_mel_bins=mels)
        mel = self.plan.now() - began
        run = Generation(self.model, batch, settings_for(new_tokens))
        run.step()
        first = self.plan.now()
        while run.running:
            run.step()
        tpot = (self.plan.now() - first) / max(1, new_tokens - 1)
        stages = {"mel": mel, "encoder": run.seconds["encode"], "prefill": run.seconds["prefill"]}
        return Run(first - began, tpot, stages)

    def warm(self) -> None:
        self.run(min(4, self.plan.new_tokens))

    def stages(self) -> dict[str, float]:
        return self.run(1).stages

    def logits(self, forced: Tensor) -> Tensor:
        """(B, n + 1, V) of the prompts and ids (B, n) behind them."""
        mels = self.model.config.audio.num_mel_bins
        batch = chat.collate(self.prompts, 0, device=self.plan.device, num_mel_bins=mels)
        run = Generation(self.model, batch, settings_for(forced.shape[1] + 1))
        found = [run.logits]
        for tokens in forced.split(1, 1):
            x = self.model.language_model.model.embed_tokens(tokens)
            found.append(self.model.decode(x, cache=run.cache)[:, 0])
        return torch.stack(found, 1)

    def close(self) -> None: ...


class Fast:
    """engine.py, every prompt submitted at once."""

    def __init__(self, plan: Plan, model: Qwen2Audio, prompts: list[chat.Prompt], **options: Any):
        self.plan, self.model, self.prompts = plan, model, prompts
        longest = max(len(prompt.ids) for prompt in prompts)
        self.engine = Engine(
            model, max_batch=len(prompts),
            max_tokens=longest + max(plan.new_tokens, FORCED + 2), prefix_bytes=0,
            prefill_tokens=10**9, worker=False, **options,
        )  # fmt: skip

    def run(self, new_tokens: int) -> Run:
        stamps: list[float] = []
        began = self.plan.now()
        requests = [
            self.engine.submit(
                prompt,
                settings_for(new_tokens),
                seed=0,
                on_token=lambda _: stamps.append(time.perf_counter()),
            )
            for prompt in self.prompts
        ]
        while self.engine.advance():
            pass
        done, count = self.plan.now(), len(requests)
        first = stamps[count - 1]  # all read in one pass: nobody's second comes before
        assert all(len(request.ids) == new_tokens for request in requests)
        return Run(first - began, (done - first) / max(1, new_tokens - 1), {})

    def warm(self) -> None:
        self.run(self.plan.new_tokens)  # records a graph for every length on the way

    def stages(self) -> dict[str, float]:
        slots, took = self.engine.slots, {"mel": 0.0, "encoder": 0.0}
        encode, mel = slots.encode, packed_encoder.log_mel

        def timed(stage: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*words: Any) -> Tensor:
                before = self.plan.now()
                found = function(*words)
                took[stage] += self.plan.now() - before
                return found

            return run

        slots.encode, packed_encoder.log_mel = timed("encoder", encode), timed("mel", mel)
        try:
            ttft = self.run(1).ttft
        finally:
            slots.encode, packed_encoder.log_mel = encode, mel
        prefill = ttft - took["encoder"]
        return {"mel": took["mel"], "encoder": took["encoder"] - took["mel"], "prefill": prefill}

    def logits(self, forced: Tensor) -> Tensor:
        return forced_logits(self.engine.slots, self.prompts, forced)

    def close(self) -> None:
        self.engine.close()


def forced_logits(slots: Slots, prompts: list[chat.Prompt], written: Tensor) -> Tensor:
    """Logits (B, n + 1, V) of an engine's slots made to continue prompts with ids (B, n)."""
    head, recordings, seen = slots.head, slots.recordings, []

    def watched(x: Tensor) -> Tensor:
        seen.append(head(x))
        return seen[-1]

    slots.head, slots.recordings = watched, None  # a replayed graph would not pass here
    budget, found = written.shape[1] + 2, []
    try:
        with torch.inference_mode():
            jobs = [
                Job(row, prompt.ids, prompt.clips, settings_for(budget), budget, 0)
                for row, prompt in enumerate(prompts)
            ]
            for together in [[job] for job in jobs] if slots._deterministic else [jobs]:
                slots.prefill(together)  # as the engine does
            found.append(torch.cat(seen))
            for step in range(written.shape[1]):
                seen.clear()
                for row, prompt in enumerate(prompts):
                    slots.ids[row, len(prompt.ids) + step] = written[row, step]
                slots.step(len(prompts))
                found.append(torch.cat(seen))
            for row in range(len(prompts)):
                slots.clear(row)
    finally:
        slots.head, slots.recordings = head, recordings
    return torch.stack(found, 1)


# --- theirs ---------------------------------------------------------------------------------------


class Theirs:
    """transformers, from waveforms to tokens."""

    def __init__(self, plan: Plan, model: Any, prompts: list[chat.Prompt], compiled: bool):
        import transformers
        from transformers.generation.streamers import BaseStreamer

        class Stamps(BaseStreamer):
            """When each step's tokens were handed out; the first call is the prompt."""

            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, value: Tensor) -> None:
                self.times.append(time.perf_counter())

            def end(self) -> None: ...

        self._stamps = Stamps
        self.plan, self.model, self.prompts = plan, model, prompts
        self.extractor = transformers.WhisperFeatureExtractor(
            feature_size=model.config.audio_config.num_mel_bins, n_samples=MAX_SAMPLES
        )
        self.options: dict[str, Any] = {}
        if compiled:
            self.options["cache_implementation"] = "static"
            if plan.quick or plan.device.type == "cpu":  # through the same gates, compiling nothing
                config = transformers.generation.CompileConfig(backend="eager", mode=None)
                config._compile_all_devices = True
                self.options["compile_config"] = config

    def inputs(self) -> dict[str, Tensor]:
        """The processor's work, but for the tokenizer."""
        heard = self.extractor(
            [prompt.clips[0].numpy() for prompt in self.prompts],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="max_length",
            return_attention_mask=True,
            device=str(self.plan.device),
        )
        ids = torch.tensor([prompt.ids for prompt in self.prompts], device=self.plan.device)
        dtype = next(self.model.parameters()).dtype
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": heard["input_features"].to(self.plan.device, dtype),
            "feature_attention_mask": heard["attention_mask"].to(self.plan.device),
        }

    def run(self, new_tokens: int) -> Run:
        began, stamps = self.plan.now(), self._stamps()
        inputs = self.inputs()
        mel = self.plan.now() - began
        self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            streamer=stamps,
            **self.options,
        )
        first, last = stamps.times[1], stamps.times[-1]
        assert len(stamps.times) == new_tokens + 1
        return Run(first - began, (last - first) / max(1, new_tokens - 1), {"mel": mel})

    def warm(self) -> None:
        # Compiling depends on the length of the static cache, and so on the number of tokens; what
        # cuDNN plans, on every length on the way.
        on_gpu = self.plan.device.type == "cuda"
        self.run(self.plan.new_tokens if self.options or on_gpu else min(4, self.plan.new_tokens))

    def stages(self) -> dict[str, float]:
        tower = getattr(self.model, "audio_tower", None) or self.model.model.audio_tower
        marks: list[float] = []
        hooks = (
            tower.register_forward_pre_hook(lambda *_: marks.append(self.plan.now())),
            tower.register_forward_hook(lambda *_: marks.append(self.plan.now())),
        )
        try:
            found = self.run(1)
        finally:
            for hook in hooks:
                hook.remove()
        mel, encoder = found.stages["mel"], marks[1] - marks[0]
        return {"mel": mel, "encoder": encoder, "prefill": found.ttft - mel - encoder}

    def logits(self, forced: Tensor) -> Tensor:
        inputs = self.inputs()
        inputs["input_ids"] = torch.cat((inputs["input_ids"], forced), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        last = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, words: words[0][:, -forced.shape[1] - 1 :]  # of all positions: gigabytes
        )
        try:
            return self.model(**inputs).logits
        finally:
            last.remove()

    def close(self) -> None:
        if self.options:
            torch.compiler.reset()  # it would keep this model and its recorded graphs


# --- the grid -------------------------------------------------------------------------------------


class Grid:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.model = random_model(plan.config, plan.device, plan.dtype)
        self.references = self._references()
        self.twins = {
            name: quantised_twin(self.model, scheme)
            for name, scheme in SCHEMES.items()
            if name in plan.arms
        }
        self.errors: dict[tuple[str, int, int], dict[str, float]] = {}
        self.cells: dict[tuple[int, int], dict[str, Any]] = {}
        self.runs: dict[tuple[tuple[int, int], str], list[Run]] = {}

    def _references(self) -> dict[int, dict[int, Tensor]]:
        """Seconds of audio -> first and last row of each batch -> float32 logits (n + 1, V), of the
        prompt alone, from a copy of the model."""
        plan = self.plan
        wide = weights.without_storage(plan.config)
        state = {name: tensor.float() for name, tensor in self.model.state_dict().items()}
        wide.load_state_dict(state, assign=True)
        del state
        found: dict[int, dict[int, Tensor]] = {}
        for seconds in dict.fromkeys(seconds for seconds, _ in plan.cells):
            batches = {batch for length, batch in plan.cells if length == seconds}
            prompts = prompts_of(plan.config, seconds, max(batches))
            forced = forced_ids(plan.config, seconds, max(batches)).to(plan.device)
            found[seconds] = {
                row: Plain(plan, wide.eval(), [prompts[row]]).logits(forced[row, None])[0]
                for row in sorted({0, *(batch - 1 for batch in batches)})
            }
        return found

    def arm(self, name: str, prompts: list[chat.Prompt]) -> Any:
        if name in ("eager", "sdpa", "compiled"):
            attention = "eager" if name == "eager" else "sdpa"
            theirs = transformers_model(self.model, attention)
            return Theirs(self.plan, theirs, prompts, name == "compiled")
        if name == "plain":
            return Plain(self.plan, self.model, prompts)
        model = self.twins.get(name, self.model)
        return Fast(self.plan, model, prompts, int8_cache=name == "int8_cache")

    def error(self, name: str, arm: Any, seconds: int) -> dict[str, float]:
        """How far an arm's logits are from float32's, all its prompts read and continued at once:
        in the worst of the rows that have a reference, the first and the last among them."""
        batch = len(arm.prompts)
        key = name, seconds, batch
        if key not in self.errors:
            rows = [row for row in self.references[seconds] if row < batch]
            expected = torch.stack([self.references[seconds][row] for row in rows])
            forced = forced_ids(self.plan.config, seconds, batch).to(self.plan.device)
            found = arm.logits(forced)[rows].float()
            off = found - expected
            self.errors[key] = {
                "rms": float((off.norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max()),
                "largest": float(off.abs().max()),
                "agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
            }
        return self.errors[key]

    def allowed(self, name: str, seconds: int, prompts: list[chat.Prompt]) -> float:
        """Twice what transformers is off by, which is measured for that where it is no arm."""
        key = "sdpa", seconds, len(prompts)
        if key not in self.errors:
            self.error("sdpa", self.arm("sdpa", prompts), seconds)
        floor = torch.finfo(torch.float32).eps * 100
        return 2 * self.errors[key]["rms"] + floor + WORSE.get(name, 0.0)

    def turns(self) -> Iterator[tuple[int, tuple[int, int], str]]:
        """(round, cell, arm), the most telling first."""
        plan = self.plan
        every = [
            (cell, arm)
            for cell in plan.cells
            for arm in plan.arms
            if arm != "compiled" or cell == plan.cells[0]
        ]
        asked = {((seconds, batch), arm) for _, seconds, batch, arm, *_ in TARGETS}
        asked.add((plan.cells[0], "compiled"))
        every.sort(key=lambda turn: (turn not in asked, turn[1] == "compiled"))
        for number in range(plan.rounds):
            for cell, arm in every[:: 1 if number % 2 == 0 else -1]:
                if number == 0 or arm != "compiled":
                    yield number, cell, arm

    def turn(self, cell: tuple[int, int], name: str) -> bool:
        """One arm on one length and batch, and what there is of the cell so far; False if it does
        not run, or is wrong."""
        seconds, batch = cell
        prompts = prompts_of(self.plan.config, seconds, batch)
        arms = self.cells.setdefault(
            cell, {"seconds": seconds, "batch": batch, "prompt": len(prompts[0].ids), "arms": {}}
        )["arms"]
        runs = self.runs.setdefault((cell, name), [])
        with self.memory() as peak:
            try:
                entry = self.visit(name, seconds, prompts, first=not runs)
            except Exception as error:  # one arm's trouble is no other's
                line = (str(error).splitlines() or [type(error).__name__])[0]
                entry = {"refused": f"{type(error).__name__}: {line[:200]}"}
        if "refused" in entry:
            arms[name] = entry
            return False
        run = entry.pop("run")
        run.peak = peak[0]
        runs.append(run)
        arms[name] = arms.get(name, {}) | entry
        floors = self.floors(seconds, batch)[name]
        arms[name] |= self.figures(name, batch, runs, arms[name]["stages"], floors)
        return True

    def visit(
        self, name: str, seconds: int, prompts: list[chat.Prompt], first: bool
    ) -> dict[str, Any]:
        arm = self.arm(name, prompts)
        entry: dict[str, Any] = {}
        try:
            if first:
                entry["error"] = self.error(name, arm, seconds)
                rms, limit = entry["error"]["rms"], self.allowed(name, seconds, prompts)
                if not rms <= limit:
                    off = f"the logits are off by {rms:.3f} rms, allowed are {limit:.3f}"
                    return {"refused": off, "error": entry["error"]}
                if self.plan.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # an answer's peak, not the check's
            # Theirs may have cuDNN's attention, which gpu.settle turns off: it is warm for them.
            torch.backends.cuda.enable_cudnn_sdp(isinstance(arm, Theirs))
            began = self.plan.now()
            arm.warm()
            warm = self.plan.now() - began
            if first:
                entry |= {"warm_s": warm, "stages": arm.stages()}
            entry["run"] = arm.run(self.plan.new_tokens)
        finally:
            arm.close()
        return entry

    def figures(
        self,
        name: str,
        batch: int,
        runs: list[Run],
        stages: dict[str, float],
        floors: dict[str, float],
    ) -> dict[str, Any]:
        ttft = statistics.median(run.ttft for run in runs)
        tpot = statistics.median(run.tpot for run in runs)
        times = {**stages, "ttft": ttft, "tpot": tpot}
        tokens = self.plan.new_tokens
        peaks = [run.peak for run in runs if run.peak is not None]
        return {
            **times,
            "tokens_per_s": batch / tpot,
            "end_to_end_tokens_per_s": batch * tokens / (ttft + tpot * (tokens - 1)),
            "tpot_runs": [run.tpot for run in runs],
            "floor": floors,
            "of_floor": {stage: floors[stage] / max(times[stage], 1e-9) for stage in floors},
            "peak_bytes": max(peaks) if peaks else None,
        }

    @contextmanager
    def memory(self) -> Iterator[list[int | None]]:
        """What is allocated at most, beyond what was before; what an arm held is given back."""
        gc.collect()
        peak: list[int | None] = [None]
        if self.plan.device.type != "cuda":
            yield peak
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - before

    # --- what the machine allows ---

    def floors(self, seconds: int, batch: int) -> dict[str, dict[str, float]]:
        """Arm -> stage -> seconds. The operations and bytes are the least that any arm needs."""
        config, ceilings = self.plan.config, self.ceilings
        operations, read = ceilings["matmul"] * 1e12, ceilings["read"] * 1e9
        lengths = clip_lengths(seconds * SAMPLE_RATE)
        text, audio = config.text, config.audio
        itemsize = self.plan.dtype.itemsize
        sizes = {name: tensor.numel() for name, tensor in self.model.state_dict().items()}

        def numbers(part: str) -> int:
            return sum(
                n for name, n in sizes.items() if name.startswith(part) and "norm" not in name
            )

        frames, width = lengths.conv_frames, audio.d_model
        encoder_weights = numbers("audio_tower") + numbers("multi_modal_projector")
        linear = 2 * frames * numbers("audio_tower.layers")
        attention = 4 * frames * frames * width * audio.encoder_layers
        convolutions = 2 * 3 * (2 * frames * audio.num_mel_bins * width + frames * width * width)
        encoder = max(
            batch * (linear + attention + convolutions) / operations,
            encoder_weights * itemsize / read,
        )
        samples, mel_frames = seconds * SAMPLE_RATE, 2 * frames
        mel = batch * 4 * (samples + audio.num_mel_bins * mel_frames) / (ceilings["copy"] * 1e9)
        prompt = lengths.audio_tokens + TEXT
        layers, head = numbers("language_model.model.layers"), numbers("language_model.lm_head")
        causal = 2 * prompt * prompt * text.hidden_size * text.num_hidden_layers
        # Behind the last layer's attention only the last position is needed.
        layer = f"language_model.model.layers.{text.num_hidden_layers - 1}."
        unneeded = 2 * (prompt - 1) * (numbers(f"{layer}self_attn.o_proj") + numbers(f"{layer}mlp"))
        prefill = batch * (2 * prompt * layers - unneeded + causal + 2 * head) / operations
        heads = 2 * text.num_hidden_layers * text.num_key_value_heads
        held = batch * (prompt + self.plan.new_tokens / 2) * heads
        found = {}
        for name in self.plan.arms:
            twin = self.twins.get(name)
            codes = quantize.code_names(twin) if twin is not None else {}
            state = twin.state_dict() if twin is not None else {}
            step = sum(state[code].nbytes for code in codes) or (layers + head) * itemsize
            number = text.head_dim + 4 if name == "int8_cache" else text.head_dim * itemsize
            one = {
                "mel": mel,
                "encoder": encoder,
                "prefill": max(prefill, step / read),
                "tpot": (step + held * number) / read,
            }
            one["ttft"] = one["mel"] + one["encoder"] + one["prefill"]
            found[name] = one
        return found

    def run(self, ceilings: dict[str, float], show: Callable[[list[Any]], None]) -> list[Any]:
        """All turns that the budget allows; `show` gets the cells so far after each. Returns those
        that there was no time for, but for second opinions."""
        self.ceilings = ceilings
        left_out: list[Any] = []
        took = {"compiled": COMPILING if self.plan.device.type == "cuda" else 0.0}
        over: set[tuple[tuple[int, int], str]] = set()
        for number, cell, name in self.turns():
            if (cell, name) in over:
                continue
            if self.plan.left <= took.get(name, 0.0):  # it may take as long as in any cell before
                over.add((cell, name))
                if number == 0:
                    left_out.append({"seconds": cell[0], "batch": cell[1], "arm": name})
                continue
            began = time.perf_counter()
            if not self.turn(cell, name):
                over.add((cell, name))
            spent = time.perf_counter() - began
            took[name] = max(took.get(name, 0.0), spent)
            print(f"{cell[0]} s x {cell[1]}, {name}: {spent:.1f} s")
            show([self._in_order(self.cells[one]) for one in self.plan.cells if one in self.cells])
        return left_out

    def _in_order(self, cell: dict[str, Any]) -> dict[str, Any]:
        arms = {name: cell["arms"][name] for name in self.plan.arms if name in cell["arms"]}
        return cell | {"arms": arms}


def table(cell: dict[str, Any]) -> Iterator[str]:
    """A cell for a person: milliseconds, and in brackets the floor's share of each."""
    yield (
        f"{cell['seconds']} s of audio, batch {cell['batch']}, prompt of {cell['prompt']}\n"
        f"{'arm':11}{'mel':>15}{'encoder':>17}{'prefill':>17}{'ttft':>17}{'tpot':>17}"
        f"{'tokens/s':>11}{'peak GB':>9}{'error':>9}"
    )
    for name, arm in cell["arms"].items():
        if "refused" in arm:
            yield f"{name:11} REFUSED: {arm['refused']}"
            continue
        parts = [
            f"{arm[stage] * 1e3:.3g} ({arm['of_floor'][stage]:.0%})"
            for stage in ("mel", "encoder", "prefill", "ttft", "tpot")
        ]
        peak = "" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 1e9:.2f}"
        yield (
            f"{name:11}{parts[0]:>15}" + "".join(f"{part:>17}" for part in parts[1:])
            + f"{arm['tokens_per_s']:11.1f}{peak:>9}{arm['error']['rms']:9.4f}"
        )  # fmt: skip


def reached(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was found; nothing where its cell or arm was not run."""
    found = []
    known = {(cell["seconds"], cell["batch"]): cell["arms"] for cell in cells}
    for figure, seconds, batch, arm, side, wanted in TARGETS:
        one: Any = known.get((seconds, batch), {}).get(arm, {})
        for part in figure.split("."):
            one = one.get(part) if isinstance(one, dict) else None
        entry = {"figure": figure, "seconds": seconds, "batch": batch, "arm": arm}
        entry |= {"wanted": f"{side} {wanted}", "found": one}
        if one is not None:
            entry["reached"] = one >= wanted if side == ">=" else one <= wanted
        found.append(entry)
    peers = known.get((3, 1), {})
    if "tpot" in peers.get("engine", {}) and "tpot" in peers.get("compiled", {}):
        ratio = peers["compiled"]["tpot"] / peers["engine"]["tpot"]
        entry = {
            "figure": "engine's speed over compiled",
            "seconds": 3,
            "batch": 1,
            "arm": "engine",
        }
        found.append(entry | {"wanted": ">= 1.3", "found": ratio, "reached": ratio >= 1.3})
    return found


def plot(result: dict[str, Any], path: str) -> None:
    """Tokens a second of every arm and cell, with what reading alone would allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = sorted(result["cells"], key=lambda cell: (cell["batch"], cell["seconds"]))
    figure, axes = pyplot.subplots(
        1, len(cells), figsize=(3.2 * len(cells) + 1, 4), squeeze=False, layout="constrained"
    )
    for axis, cell in zip(axes[0], cells, strict=True):
        arms = {name: arm for name, arm in cell["arms"].items() if "tpot" in arm}
        places = range(len(arms))
        axis.bar(places, [arm["tokens_per_s"] for arm in arms.values()], color="#4477aa")
        limits = [cell["batch"] / arm["floor"]["tpot"] for arm in arms.values()]
        axis.scatter(places, limits, marker="_", s=250, color="black", label="reading speed allows")
        axis.set_xticks(list(places), list(arms), rotation=60, ha="right")
        axis.set_title(f"{cell['seconds']} s, batch {cell['batch']}")
    axes[0][0].set_ylabel("tokens a second, all answers together")
    axes[0][0].legend(fontsize="small")
    machine = result["machine"]
    figure.suptitle(f"{machine['name']}, {machine['shapes']} shapes, {machine['dtype']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def grid(args: argparse.Namespace) -> int:
    """Run it as main and bench_model.py ask for it; returns the exit code."""
    import transformers

    sys.path[:0] = [str(ROOT / "kernels" / "benchmarks"), str(ROOT / "kernels")]
    from bench import machine, measure_ceilings

    transformers.utils.logging.set_verbosity_error()
    gpu.settle()
    device = torch.device(args.device)
    config = SHAPES.get(args.shapes) or Qwen2AudioConfig.from_json(args.shapes)
    cells = CELLS
    if args.quick:
        cells = tuple(dict.fromkeys((seconds, min(batch, 2)) for seconds, batch in CELLS[:4]))
    if args.cells:
        cells = tuple(_cell(word) for word in args.cells.split(","))
    arms = tuple(args.arms.split(",")) if args.arms else ARMS
    if wrong := [arm for arm in arms if arm not in ARMS]:
        raise InputError(f"no arm {wrong[0]!r}; there are {', '.join(ARMS)}")
    dtype = getattr(torch, args.dtype or "bfloat16")
    tokens = args.new_tokens or (6 if args.quick else 128)
    plan = Plan(config, device, dtype, cells, arms, tokens, args.rounds, args.budget, args.quick)
    with torch.inference_mode():
        ceilings = measure_ceilings(device.type, args.quick or device.type == "cpu")
        about: dict[str, Any] = {
            "name": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "device": str(device),
            "shapes": args.shapes,
            "dtype": str(dtype).removeprefix("torch."),
            "quick": args.quick,
            "new_tokens": tokens,
            "transformers": transformers.__version__,
            **{key: value for key, value in machine().items() if key != "gpu"},
        }
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        if device.type == "cpu":
            print("on a CPU this shows that everything runs; its speeds stand for nothing")
        units = {"read": "GB/s", "copy": "GB/s", "matmul": "TFLOP/s"}
        print(", ".join(f"{name} {value:.4g} {units[name]}" for name, value in ceilings.items()))
        result: dict[str, Any] = {"machine": about, "ceilings": ceilings, "cells": []}

        def show(cells: list[Any]) -> None:
            result["cells"] = cells
            save(result, args.json)  # whatever may end the run later

        try:
            result["left_out"] = Grid(plan).run(ceilings, show)
        finally:  # also of what a run that is stopped has found
            for cell in result["cells"]:
                print("\n".join(table(cell)))
    result["targets"] = reached(result["cells"]) if args.shapes == "official" else []
    for one in result["targets"]:
        found = "not run" if one["found"] is None else f"{one['found']:.4g}"
        verdict = {True: "reached", False: "NOT reached"}.get(one.get("reached"), "")
        print(
            f"{one['figure']} of {one['arm']}, {one['seconds']} s, batch {one['batch']}:"
            f" {found}, wanted {one['wanted']} {verdict}"
        )
    if result["left_out"]:
        turns = ", ".join(
            f"{one['seconds']}x{one['batch']} {one['arm']}" for one in result["left_out"]
        )
        print(f"left out, the budget of {args.budget:.0f} s was spent: {turns}")
    save(result, args.json)
    if args.plot and result["cells"]:
        plot(result, args.plot)
    refused = [arm for cell in result["cells"] for arm in cell["arms"].values() if "refused" in arm]
    return 1 if refused else 0


def save(result: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def _cell(word: str) -> tuple[int, int]:
    try:
        seconds, batch = (int(part) for part in word.split("x"))
    except ValueError:
        seconds = batch = 0
    if not 1 <= seconds <= 30 or batch < 1:
        raise InputError(f"{word!r} is no cell; write seconds x batch, as in 30x8")
    return seconds, batch


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only the grid has."""
    parser.add_argument(
        "--quick", action="store_true", help="few cells, few tokens, small ceilings"
    )
    parser.add_argument("--cells", help="seconds x batch, such as 3x1,30x32; default: all nine")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}; default: all")
    parser.add_argument("--new-tokens", type=int, help="of each answer; default 128")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every arm, default 2")
    parser.add_argument(
        "--budget", type=float, default=1800.0, help="seconds for all, default 1800"
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture of the speeds")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes", default="official", help=f"{', '.join(SHAPES)}, or a config.json"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--json", metavar="FILE")
    arguments(parser)
    args = parser.parse_args(argv)
    try:
        return grid(args)
    except InputError as error:
        print(f"bench_grid: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
