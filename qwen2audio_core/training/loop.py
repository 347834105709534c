"""The loop: batches in, weights out. One for all three stages."""

import copy
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from qwen2audio_core import assistant, hub, ops, packed_linear, saving, weights
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.holding import held
from qwen2audio_core.model import Qwen2Audio, splice
from qwen2audio_core.terminal import note
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training import checkpoint, lora, losses, parallel, report
from qwen2audio_core.training.data import (
    Augment,
    Batch,
    Example,
    Loader,
    Rows,
    Sounds,
    cut,
    plan,
)
from qwen2audio_core.training.parallel import Group

Stage = Literal["pretrain", "sft", "dpo"]
AGAIN = "; checkpoints before it are whole: give the same command to go on"
TOGETHER = 32  # rows that are measured on at once, at most


@dataclass
class Settings:
    """Everything a run depends on: the same settings on the same data make the same weights."""

    model: str  # folder or hub id to begin with
    data: list[str]  # jsonl files, "file@weight" to mix
    out: str
    stage: Stage = "sft"
    valid: str | None = None  # jsonl
    # How long, and how fast
    steps: int | None = None  # the run ends after so many
    minutes: float | None = None  # or after so long; the schedule follows whichever is nearer
    lr: float = 1e-4
    warmup: int = 100  # steps in which the rate rises from 0
    floor: float = 0.0  # the rate at the end, as a part of lr
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0  # largest norm of the gradient
    # What a step sees
    batch_seconds: float = 96.0
    batch_tokens: float = 8192
    accumulate: int = 1  # batches in a step
    short_first: int = 0  # batches of the first epoch in order of length
    augment: Augment = field(default_factory=Augment)
    workers: int = 0  # processes that prepare batches
    seed: int = 0
    # What is trained
    adapter: lora.Settings | None = None  # adapters alone
    freeze: tuple[str, ...] = ()  # patterns of parameter names
    mean_over: Literal["tokens", "rows"] = "tokens"  # of the loss; rows: each counts once
    ctc_weight: float = 0.0  # of an auxiliary loss on the encoder: which characters, in order
    sounds: str | None = None  # jsonl of when each speech sound is heard, as data.Sounds says
    sounds_weight: float = 1.0  # of an auxiliary loss on the encoder: which sound in each frame
    attend_weight: float = 0.0  # of an auxiliary loss: attend to a token where sounds place it
    auxiliary_until: float = 1.0  # all fall linearly to 0 at this part of the run
    listen_steps: int = 0  # so many at first with the encoder's auxiliary losses alone
    dpo_beta: float = 0.1
    dpo_sft: float = 0.0  # weight of the better answers' own loss beside the preference
    # How it is computed
    bf16: bool = True  # autocast; what is trained stays in float32
    recompute: bool = False  # activations again in the backward pass: less memory, a third slower
    device: str | None = None  # None: a GPU if there is one
    # What is written
    save_every: int = 500
    keep: int = 2
    keep_best: bool = False  # also the result of the lowest loss on the validation rows
    eval_every: int = 500
    eval_rows: int = 256
    samples: int = 64  # answers written at every evaluation
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.stage not in ("pretrain", "sft", "dpo"):
            raise InputError(f"stage is {self.stage!r}, expected pretrain, sft or dpo")
        for name in ("lr", "clip", "batch_seconds", "batch_tokens", "dpo_beta", "auxiliary_until"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must be above 0")
        if self.mean_over not in ("tokens", "rows"):
            raise InputError(f"mean_over is {self.mean_over!r}, expected tokens or rows")
        if self.mean_over == "rows" and self.stage == "dpo":
            raise InputError("mean_over rows is for pretrain and sft: dpo's loss is of pairs")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes is {self.minutes}, it must be above 0")
        for name in ("lr", "clip", "batch_seconds", "batch_tokens"):
            if math.isinf(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)}, it must be a number")
        for name in ("accumulate", "save_every", "keep", "eval_every", "eval_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in (
            *("warmup", "weight_decay", "workers", "samples", "short_first", "listen_steps"),
            *("ctc_weight", "sounds_weight", "attend_weight", "dpo_sft"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 0")
        if self.keep_best and self.valid is None:
            raise InputError("keep_best is of rows to measure on: give valid")
        if self.workers and sys.platform == "darwin":
            raise InputError("workers: processes that were forked break on macOS, leave it at 0")
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor is {self.floor}, it must be 0 to 1")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}, it must be 0 to {2**31 - 1}")
        if self.sounds and self.augment.speed:
            raise InputError(
                "clips of another speed have their sounds at other times: leave it out"
            )
        if self.attend_weight and not self.sounds:
            raise InputError("attend_weight needs to know what is said when: give sounds")
        if self.listen_steps and self.stage == "dpo":
            raise InputError("listen_steps is for pretrain and sft: dpo compares answers")
        if self.listen_steps and not (self.sounds or self.ctc_weight):
            raise InputError("listen_steps needs an auxiliary loss: give sounds or ctc_weight")


class Trainee(nn.Module):
    """The model, and heads for the auxiliary losses that are not part of it.

    alphabet    characters of the transcripts; class i + 1 is alphabet[i], 0 the blank; "" for none
    sounds      how many speech sounds there are to name; 0 for no such head
    attend      guide heads of the decoder to where the tokens of a transcript are said
    by_row      the loss is a sum over rows of their means, and not over tokens
    lockstep    run every part of the model on every batch, even on one without sound: processes
                that share the weights wait for one another at each layer
    """

    def __init__(
        self,
        model: Qwen2Audio,
        alphabet: str = "",
        sounds: int = 0,
        attend: bool = False,
        by_row: bool = False,
        lockstep: bool = False,
    ):
        super().__init__()
        self.model = model
        self.lockstep, self.by_row = lockstep, by_row
        self.listening = False  # run the encoder alone
        self.alphabet = {character: i for i, character in enumerate(alphabet, start=1)}
        self._states: Tensor | None = None
        width, device = model.config.audio.d_model, model.language_model.lm_head.weight.device
        if alphabet:
            self.ctc_head = nn.Linear(width, len(alphabet) + 1, device=device)
        if sounds:
            self.sounds_head = nn.Linear(width, sounds, device=device)
        if alphabet or sounds:
            model.audio_tower.layers[-1].register_forward_hook(self._keep)
        self._queries: list[tuple[Tensor, Tensor]] | None = None  # a list during forward alone
        if attend:
            layers = model.language_model.model.layers
            for layer in layers[len(layers) // 2 :]:
                module: Any = layer.self_attn
                module.attention_op = self._guided(module.attention_op)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._states = output  # (n, T, Da), 50 a second

    def _guided(self, op: Any) -> Any:
        """The same attention, that keeps the first half of its heads' queries and keys."""

        def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.training:
                half = max(1, k.shape[2] // 2)
                group = q.shape[2] // k.shape[2]
                kept = k[:, :, :half].repeat_interleave(group, dim=2)
                if self._queries is not None:  # it is when a layer is run again for its gradient
                    self._queries.append((q[:, :, : half * group], kept))
            y: Tensor = op(q, k, v, *args, **kwargs)
            return y

        return attention

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch: "loss" over tokens, or over rows `by_row`; with heads for them,
        "ctc" over clips, "sounds" over frames and how many of these are "right", "attend" over
        tokens. For pairs, "log_probs" (2N,) of the answers, and the "loss" is that of the better
        ones."""
        found: dict[str, Tensor] = {}
        self._queries = []
        if self.listening:
            if batch.mel is not None or self.lockstep:
                self._audio(batch)
            found["loss"] = batch.ids.new_zeros((), dtype=torch.float32)
            if self.lockstep and self._states is not None:  # a gradient for what the losses reach
                found["loss"] = found["loss"] + 0 * self._states.sum()
        else:
            x = self.model.hidden(self._embed(batch))
            x, labels = losses.supervised(x, batch.labels)
            logits = self.model.language_model.lm_head(x)
            wanted = batch.labels[:, 1:] != losses.IGNORE
            if batch.pairs:
                found["log_probs"] = losses.row_log_probs(logits, labels, wanted)
                found["loss"] = -found["log_probs"][: batch.pairs].sum()
            elif self.by_row:
                found["loss"] = losses.row_means(logits, labels, wanted)
            else:
                found["loss"] = losses.next_token(logits, labels)
        if self.alphabet and batch.spoken:
            found["ctc"] = self._ctc(batch)
        if hasattr(self, "sounds_head") and batch.sounds:
            found["sounds"], found["right"] = self._sounds(batch)
        if self._queries and batch.heard is not None:
            each = [losses.attended(q, k, batch.heard) for q, k in self._queries]
            found["attend"] = torch.stack(each).mean()
        if self.lockstep:  # a gradient for every head on every process, be it zero
            heads = [p for name, p in self.named_parameters() if not name.startswith("model.")]
            found["loss"] = found["loss"] + 0 * sum(head.sum() for head in heads)
        self._states, self._queries = None, None
        return found

    def _embed(self, batch: Batch) -> Tensor:
        model = self.model
        if not batch.pairs and not self.lockstep:
            return model.embed(batch.ids, batch.mel, batch.conv_frames)
        x: Tensor = model.language_model.model.embed_tokens(batch.ids)
        audio = self._audio(batch)
        if batch.conv_frames is None:
            return x if audio is None else x + 0 * audio.sum()
        assert audio is not None
        # The clips of the better answers are those of the worse ones: encoded once.
        copies = 2 if batch.pairs else 1
        places = (batch.conv_frames // 2).repeat(copies)
        is_audio = batch.ids == model.config.audio_token_id
        return splice(x, is_audio, audio.repeat(copies, 1, 1), places)

    def _audio(self, batch: Batch) -> Tensor | None:
        """The clips' rows; in lockstep those of a silence where the batch has none."""
        if batch.mel is not None and batch.conv_frames is not None:
            return self.model.encode_audio(batch.mel, batch.conv_frames)
        if not self.lockstep:
            return None
        device = batch.ids.device
        silence = torch.zeros(1, self.model.config.audio.num_mel_bins, 5, device=device)
        return self.model.encode_audio(silence, torch.tensor([2], device=device))

    def _ctc(self, batch: Batch) -> Tensor:
        assert self._states is not None and batch.conv_frames is not None
        device = self._states.device
        clips = torch.tensor([clip for clip, _ in batch.spoken], device=device)
        texts = [[self.alphabet[c] for c in text if c in self.alphabet] for _, text in batch.spoken]
        lengths = torch.tensor([len(text) for text in texts])
        targets = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for row, text in zip(targets, texts, strict=True):
            row[: len(text)] = torch.tensor(text, dtype=torch.long)
        states = self._states[clips]
        logits = self.ctc_head(F.layer_norm(states, states.shape[-1:]))
        frames = batch.conv_frames[clips]
        return losses.ctc(logits, frames, targets.to(device), lengths.to(device))

    def _sounds(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._states is not None
        states = torch.cat([self._states[clip, : len(known)] for clip, known in batch.sounds])
        labels = torch.cat([known for _, known in batch.sounds]).to(states.device)
        return losses.frames(self.sounds_head(F.layer_norm(states, states.shape[-1:])), labels)


def train(settings: Settings) -> Path:
    """Run to the end, from the newest checkpoint in settings.out if there is one.

    returns  the folder of the trained model, in the published layout, or of the adapter, in PEFT's
    """
    group = parallel.start(settings.device)
    if group.device.type == "cpu":
        _keep_memory()
        packed_linear.limit_shapes()  # nearly every batch has lengths of its own
    rows = read_rows(settings)
    with held(Path(settings.out)) if group.first else nullcontext():
        run = Run(settings, group, rows)
        run.go()
    return run.result


def read_rows(settings: Settings) -> Rows:
    return _usable(settings.data, count_characters=settings.ctc_weight > 0)


def read_valid(settings: Settings) -> Rows | None:
    return _usable([settings.valid]) if settings.valid else None


def planned_batches(settings: Settings, rows: Rows, epoch: int) -> list[list[int]]:
    """One epoch's batches as row numbers."""
    # A pair is two rows of tokens on the same audio.
    pair = 2 if settings.stage == "dpo" else 1
    return plan(
        rows,
        epoch,
        batch_seconds=settings.batch_seconds,
        batch_tokens=settings.batch_tokens / pair,
        seed=settings.seed,
        short_first=settings.short_first,
    )


def _usable(files: Sequence[str], count_characters: bool = False) -> Rows:
    rows = Rows(files, count_characters)
    if not len(rows):
        why = f"; the first bad one: {rows.bad[0]}" if rows.bad else ""
        raise InputError(f"{', '.join(files)}: no row that can be used{why}")
    return rows


def _load(folder: Path, settings: Settings, group: Group) -> Qwen2Audio:
    """The model, with float32 for what is trained and the files' own dtype for what is not."""
    weights.refuse_codes(folder, "which is not trained; train")
    kind = None if settings.adapter is not None and settings.bf16 else torch.float32
    model = weights.load_model(folder, device=group.device, dtype=kind)
    if settings.adapter is not None:
        torch.manual_seed(settings.seed)
        lora.add(model, settings.adapter)
    freeze(model, settings.freeze)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Memory of its own: mapped pages of a file would be copied one by one when written.
            parameter.data = parameter.data.clone()
    if group.device.type == "cpu":
        for module in model.modules():
            if hasattr(module, "attention_op"):
                module.attention_op = _attention  # type: ignore[assignment]
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters whose names match as they are."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"freeze: no parameter matches {pattern!r}, they are like {names[0]}")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: nothing is left to train ({', '.join(patterns)})")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    small = q.shape[1] * k.shape[1] <= 512 * 512
    op = ops.attention_by_products if small else ops.sdpa
    return op(q, k, v, causal, key_start, key_end)


def _recompute_layers(model: Qwen2Audio) -> None:
    for layer in (*model.audio_tower.layers, *model.language_model.model.layers):
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def _keep_memory() -> None:
    """Let the C library keep freed memory: it gives large blocks back at once otherwise, and a step
    on a CPU then spends half of its time in page faults."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(parameter, value)


@dataclass
class Progress:
    """How far a run has come: what a resumed run cannot work out from its settings."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, the next one to use
    seconds: float = 0.0  # of wall clock, pauses between runs left out
    audio_seconds: float = 0.0
    tokens: int = 0
    bad: int = 0  # rows met that could not be used
    alphabet: str | None = None
    warm: float = 0.0  # s at which the rate had risen
    lowest: float | None = None  # valid_loss that was kept as the best
    stage: str = ""  # what it was and read, for a run that goes on otherwise
    data: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # data.Rows.about
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Path) -> "Progress":
        known = {entry.name for entry in fields(cls)}
        found = checkpoint.read_progress(place)
        return cls(**{key: value for key, value in found.items() if key in known})


# Of a run that goes on, these are what they were; and these are free to change, or tell elsewhere.
FIXED = ("model", "adapter", "freeze", "mean_over")
FREE = (
    *("out", "data", "stage", "valid", "steps", "minutes", "workers", "device", "recompute"),
    *("save_every", "keep", "keep_best", "eval_every", "eval_rows", "samples", "tensorboard"),
    *FIXED,
)


def _check_same(before: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    """InputError where a run would go on with another model, or with other parts of it."""
    for name in FIXED:
        was, is_ = before.get(name, now[name]), now[name]
        gone = name == "model" and not hub.is_id(was) and was not in ("tiny", "random")
        if gone and not Path(was).exists():
            note(f"the run began with {was}, which is not there any more: {is_} has to be the same")
        elif was != is_:
            raise InputError(
                f"{place} is of a run with {name} {_short(was)}, not {_short(is_)}: choose another"
                " --out, or give what it was"
            )


def _written(settings: Settings) -> dict[str, Any]:
    """As a checkpoint keeps them; a model's folder with its whole path."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if Path(settings.model).is_dir():
        found["model"] = str(Path(settings.model).resolve())
    return found


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, was in before.items():
        if name not in FREE and name in now and now[name] != was:
            yield f"{name} was {_short(was)} and is {_short(now[name])}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value}"


class Run:
    """One run: the model, its optimizer, the data, and how far it is."""

    def __init__(self, settings: Settings, group: Group, rows: Rows):
        self.settings, self.group, self.rows = settings, group, rows
        self.out = Path(settings.out)
        done = checkpoint.checkpoints(self.out)
        self.progress = Progress.read(done[-1]) if done else Progress()
        begun = self.progress.stage or settings.stage
        if begun != settings.stage:
            raise InputError(
                f"{done[-1]} is of --stage {begun}, not {settings.stage}: choose another --out"
            )
        before, now = self.progress, _written(settings)
        if done:
            _check_same(before.settings, now, done[-1])
        self.progress = replace(
            before,
            stage=settings.stage,
            data=list(settings.data),
            rows=rows.about,
            settings=now,
        )
        if self.progress.alphabet is None:
            common = rows.characters.most_common(4000)
            self.progress.alphabet = "".join(sorted(character for character, _ in common))
        if not done and group.first and hub.is_id(settings.model):
            note(f"training begins with {settings.model}")  # before a download of it
        self.folder = assistant.find(settings.model)
        self.report = report.Report(self.out, settings.tensorboard, quiet=not group.first)
        if group.first:  # the only one that writes there
            saving.clear(self.result)
            saving.clear(self.best)
            checkpoint.clear(self.out)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        model = _load(self.folder, settings, group)
        self.config = model.config
        self.reference: nn.Module | None = None
        if settings.stage == "dpo" and settings.adapter is None:
            self.reference = Trainee(copy.deepcopy(model), lockstep=group.world > 1)
            self.reference.requires_grad_(False).eval()
            parallel.spread(self.reference, self.reference.model, group)
        if settings.recompute:
            _recompute_layers(model)
        torch.manual_seed(settings.seed)
        sounds = Sounds(settings.sounds) if settings.sounds else None
        kinds = len(sounds.names) if sounds else 0
        attend = settings.attend_weight > 0
        self.trainee = Trainee(
            model,
            self.progress.alphabet,
            kinds,
            attend,
            by_row=settings.mean_over == "rows",
            lockstep=group.world > 1,
        )
        parallel.spread(self.trainee, model, group)
        self.trained = [p for p in self.trainee.parameters() if p.requires_grad]
        self.optimizer = self._make_optimizer()
        if done:
            checkpoint.load(done[-1], self.trainee, self.optimizer, group)
            self.report.note(f"going on from {done[-1]}")
            if before.data and before.data != settings.data:
                told = f"which read {', '.join(before.data)}, not {', '.join(settings.data)}"
                self.report.note(told)
            elif before.rows and before.rows != rows.about:
                self.report.note(f"whose data had {before.rows[0]:,} rows and have changed since")
            for line in _changes(before.settings, now):
                self.report.note(line)
            if settings.steps is not None and self.progress.step >= settings.steps:
                self.report.note(f"which has all of --steps {settings.steps}: nothing is trained")
        self.report.forget_after(self.progress.step)
        limit = model.config.text.max_position_embeddings
        bins = model.config.audio.num_mel_bins
        loader = partial(Loader, tokenizer=self.tokenizer, num_mel_bins=bins, limit=limit)
        pairs = settings.stage == "dpo"
        self.loader = loader(
            rows, pairs=pairs, augment=settings.augment, sounds=sounds, attend=attend
        )
        held = read_valid(settings)
        self.valid = loader(held) if held is not None else None
        self._plans: dict[int, list[list[int]]] = {}
        self._began = time.perf_counter() - self.progress.seconds
        self._failures = 0
        for line in (*rows.bad, *(self.valid.rows.bad if self.valid else ())):
            self.report.note(line)
        self._describe(model)

    @property
    def result(self) -> Path:
        return self.out / ("adapter" if self.settings.adapter else "model")

    @property
    def best(self) -> Path:
        return self.out / f"best-{self.result.name}"

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings = self.settings
        groups = [
            {"params": [p for p in self.trained if p.ndim > 1]}
            | {"weight_decay": settings.weight_decay},
            {"params": [p for p in self.trained if p.ndim <= 1]} | {"weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        fused = self.group.world == 1
        if self.group.device.type == "cuda":  # it takes whole tensors or pieces, but no mixture
            fused = len({hasattr(p, "to_local") for p in self.trained}) <= 1
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=fused)

    def _describe(self, model: Qwen2Audio) -> None:
        trained = sum(p.numel() for p in self.trained)
        everything = sum(p.numel() for p in model.parameters())
        self.report.note(
            f"{self.settings.stage}: {len(self.rows):,} rows, {len(self.rows.bad):,} bad ones left"
            f" out, {float(self.rows.seconds.sum()) / 3600:.2f} h of audio;"
            f" {trained / 1e6:.2f} M of {everything / 1e6:.2f} M parameters are trained"
        )
        if self.settings.steps is not None and self.settings.warmup >= self.settings.steps:
            self.report.note(
                f"the rate rises for {self.settings.warmup} steps, and {self.settings.steps} are"
                f" all there are: {self.settings.lr:g} is not reached; lower --warmup"
            )
        if self.valid is not None:
            good, bad = len(self.valid.rows), len(self.valid.rows.bad)
            self.report.note(f"to measure on: {good:,} rows, {bad:,} bad ones left out")

    def go(self) -> None:
        """Steps until the end."""
        settings, progress = self.settings, self.progress
        batches = self._batches()
        part, begun = self._part(), progress.step
        while part < 1:
            began = time.perf_counter()
            figures = self._next_step(batches, part)
            progress.step += 1
            progress.seconds = time.perf_counter() - self._began
            figures["step_seconds"] = time.perf_counter() - began
            part = self._part()
            self.report.step(asdict(progress), figures, part)
            if progress.step % settings.eval_every == 0 or part >= 1:
                self._keep_if_best(self.evaluate())
            if progress.step % settings.save_every == 0 or part >= 1:
                self.save()
        if begun == progress.step:  # over already: of this checkpoint, and not of a later one
            self._write_result(self.result)
        self.report.finish()

    def _next_step(self, batches: Iterator[Batch], part: float) -> dict[str, float]:
        """A step on the next batches with a row that can be used."""
        settings, passed, fault = self.settings, 0, ""
        while True:
            mine = list(islice(batches, settings.accumulate))
            for batch in mine:
                for line in batch.bad:
                    self.report.warn(line)
                    fault = fault or line
            figures = self.step(mine, part)
            self._advance()
            if figures:
                return figures
            passed += settings.accumulate * self.group.world
            if passed >= len(self._plan(self.progress.epoch)):
                raise InputError(f"the batches of an epoch hold no row that can be used: {fault}")

    def _part(self) -> float:
        """How much of the run is over, 0 to 1."""
        settings, progress = self.settings, self.progress
        parts = [0.0]
        if settings.steps is not None:
            parts.append(progress.step / max(1, settings.steps))
        if settings.minutes is not None:
            parts.append((time.perf_counter() - self._began) / (60 * max(1e-9, settings.minutes)))
        return self.group.from_first(min(1.0, max(parts)))

    def _set_rate(self, part: float) -> float:
        """Up in a line for the warm-up's steps, then down as half a cosine over what is left."""
        settings, progress = self.settings, self.progress
        if progress.step < settings.warmup:
            if settings.minutes is not None:
                progress.warm = self.group.from_first(time.perf_counter() - self._began)
            lr = settings.lr * (progress.step + 1) / settings.warmup
        else:
            risen = 0.0  # the part of the run at which it had
            if settings.steps is not None:
                risen = settings.warmup / max(1, settings.steps)
            if settings.minutes is not None:
                risen = max(risen, progress.warm / (60 * settings.minutes))
            over = min(1.0, max(0.0, (part - risen) / max(1e-9, 1 - risen)))
            shape = 0.5 * (1 + math.cos(math.pi * over))
            lr = settings.lr * (settings.floor + (1 - settings.floor) * shape)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # Which batch comes when

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            planned = planned_batches(self.settings, self.rows, epoch)
            if not planned:
                raise InputError(
                    f"{', '.join(self.settings.data)}: an epoch has no row (weights too low)"
                )
            self._plans = {e: p for e, p in self._plans.items() if e >= epoch - 1}
            self._plans[epoch] = planned
        return self._plans[epoch]

    def _items(self, epoch: int, batch: int) -> Iterator[tuple[int, list[int]]]:
        """Seed and rows of every batch from here on, without end."""
        while True:
            planned = self._plan(epoch)
            for i in range(batch, len(planned)):
                yield ((self.settings.seed * 1009 + epoch) * 10_000_019 + i) % 2**62, planned[i]
            epoch, batch = epoch + 1, 0

    def _advance(self) -> None:
        """One step's batches of all processes are used up."""
        progress = self.progress
        progress.batch += self.settings.accumulate * self.group.world
        while progress.batch >= len(self._plan(progress.epoch)):
            progress.batch -= len(self._plan(progress.epoch))
            progress.epoch += 1

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from where the run stands."""
        items = self._items(self.progress.epoch, self.progress.batch)
        mine = islice(items, self.group.rank, None, self.group.world)
        workers = self.settings.workers
        return iter(
            DataLoader(
                self.loader,  # type: ignore[arg-type]
                batch_size=None,
                sampler=mine,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                multiprocessing_context="fork" if workers else None,
            )
        )

    def _weight(self, batch: Batch) -> int:
        """What a batch counts for in a mean."""
        return batch.supervised_rows if self.trainee.by_row else batch.supervised

    # One step

    def step(self, batches: Sequence[Batch], part: float) -> dict[str, float]:
        """One step of the optimizer on this process's batches and those of the others.

        returns  its figures; none, and nothing is changed, where no row can be used
        """
        settings, group = self.settings, self.group
        dpo = settings.stage == "dpo"
        # Dropout draws from the step's own seed, so there is no generator to save.
        torch.manual_seed((settings.seed * 1_000_003 + self.progress.step) * 64 + group.rank)
        counts = group.total(
            [
                float(sum(map(self._weight, batches))),
                float(sum(len(batch.spoken) for batch in batches)),
                float(sum(batch.pairs for batch in batches)),
                float(sum(len(known) for batch in batches for _, known in batch.sounds)),
                float(sum(len(batch.heard) for batch in batches if batch.heard is not None)),
                sum(batch.seconds for batch in batches),
                float(sum(batch.tokens for batch in batches)),
                float(sum(len(batch.bad) for batch in batches)),
            ]
        )
        self.progress.bad += int(counts[7])
        if counts[0] == 0:
            return {}
        weight, clips, pairs, frames, said = (max(1.0, count) for count in counts[:5])
        auxiliary = max(0.0, 1 - part / settings.auxiliary_until)
        lr = self._set_rate(part)
        self.trainee.train()
        self.trainee.listening = self.progress.step < settings.listen_steps
        sums = [0.0] * 7  # next token, ctc; won and margin of pairs; sounds, how many right; attend
        for batch in batches:
            batch.to(group.device)
            reference = self._reference(batch) if dpo and (batch.pairs or group.world > 1) else None
            with self._autocast():
                found = self.trainee(batch)
            loss = found["loss"] / weight
            sums[0] += float(loss.detach())
            if reference is not None:
                preference = losses.dpo(found["log_probs"], reference, settings.dpo_beta)
                loss = preference.loss / pairs + settings.dpo_sft * loss
                sums[0] += float(loss.detach()) - float(found["loss"].detach()) / weight
                sums[2] += float(preference.won) / pairs
                sums[3] += float(preference.margin) / pairs
            elif dpo:
                loss = 0 * found["loss"]  # a batch whose rows are all bad
            if "ctc" in found:
                sums[1] += float(found["ctc"].detach()) / clips
                loss = loss + auxiliary * settings.ctc_weight / clips * found["ctc"]
            if "sounds" in found:
                sums[4] += float(found["sounds"].detach()) / frames
                sums[5] += float(found["right"]) / frames
                loss = loss + auxiliary * settings.sounds_weight / frames * found["sounds"]
            if "attend" in found:
                sums[6] += float(found["attend"].detach()) / said
                loss = loss + auxiliary * settings.attend_weight / said * found["attend"]
            # Gradients are averaged over processes, the counts above are sums over them.
            if loss.requires_grad:  # listening, on a batch without speech, it does not
                (loss * group.world).backward()
        parallel.average_whole(self.trained, group)
        norm = parallel.clip_gradients(self.trained, settings.clip, group)
        self._update(norm)
        loss_sum, ctc_sum, won, margin, sounds, right, attend = group.total(sums)
        self.progress.audio_seconds += counts[5]
        self.progress.tokens += int(counts[6])
        figures = {"loss": loss_sum, "norm": norm, "lr": lr}
        if self.progress.alphabet:
            figures["ctc"] = ctc_sum
        if dpo:
            figures |= {"won": won, "margin": margin}
        if settings.sounds:
            figures |= {"sounds": sounds, "right": right}
        if settings.attend_weight:
            figures["attend"] = attend
        return figures | {"audio_seconds": counts[5], "tokens": counts[6]}

    def _update(self, norm: float) -> None:
        if math.isfinite(norm):
            self.optimizer.step()
            self._failures = 0
        else:
            self._failures += 1
            self.report.note(
                f"step {self.progress.step}: the gradient is not finite, nothing is changed"
            )
            if self._failures == 10:
                raise InputError(
                    f"the gradient has not been finite for 10 steps, the last is step"
                    f" {self.progress.step}: lower --lr, or look for broken rows with --check"
                )
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor | None:
        """What the answers' log p was at first; None on a batch whose rows are all bad."""
        with self._autocast():
            if self.reference is not None:
                found = self.reference(batch)
            else:
                self.trainee.eval()  # no dropout in what is compared with
                with lora.disabled(self.trainee):
                    found = self.trainee(batch)
                self.trainee.train()
        return found.get("log_probs")

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.settings.bf16)

    # Between steps

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Loss on the validation rows, which it returns, and some answers beside what they should
        be."""
        if self.valid is None:
            return None
        settings, loader = self.settings, self.valid
        rows = loader.rows
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(rows), generator=generator)[: settings.eval_rows].tolist()
        chosen.sort(key=lambda i: float(rows.tokens[i]))
        limits = {"batch_seconds": settings.batch_seconds, "batch_tokens": settings.batch_tokens}
        self.trainee.eval()
        self.trainee.listening = False
        total, weight = 0.0, 0
        for numbers in cut(rows, chosen, most=TOGETHER, **limits):
            batch = loader[0, numbers]
            for line in batch.bad:
                self.report.note(line)
            weight += self._weight(batch)
            with self._autocast():
                total += float(self.trainee(batch.to(self.group.device))["loss"])
        figures: dict[str, Any] = {"valid_loss": total / weight} if weight else {}
        if not weight:
            self.report.note(f"{settings.valid}: none of its rows can be used, nothing is measured")
        # Writing needs the whole model on one process.
        if self.group.world == 1 and settings.samples:
            shown = chosen[:: -(-len(chosen) // settings.samples)] if chosen else []
            batches = cut(rows, shown, most=TOGETHER, **limits)
            figures |= self._samples([loader.examples(numbers)[0] for numbers in batches])
        self.trainee.train()
        self.report.evaluation(asdict(self.progress), figures)
        return figures.get("valid_loss")

    def _keep_if_best(self, loss: float | None) -> None:
        """Write the result beside the newest one, if it has the lowest loss on the validation rows
        so far."""
        if loss is None or not self.settings.keep_best:
            return
        loss = self.group.from_first(loss)  # all processes write, or none
        if loss < (math.inf if self.progress.lowest is None else self.progress.lowest):
            self.progress.lowest = loss
            self._write_result(self.best)
            self.report.note(f"step {self.progress.step}: the lowest valid_loss, {self.best}")

    def _samples(self, batches: list[list[Example]]) -> dict[str, Any]:
        model = self.trainee.model
        assert isinstance(model, Qwen2Audio)
        batches = [batch for batch in batches if batch]
        return report.samples(model, self.tokenizer, batches) if batches else {}

    def save(self) -> None:
        """The result so far, then a checkpoint to go on from.

        In this order a run that is killed between the two takes its last steps again and writes its
        result again; the other way round it would be over without one.
        """
        settings, group = self.settings, self.group
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_result(self.result)
        checkpoint.save(
            self.out, asdict(self.progress), self.trainee, self.optimizer, settings.keep, group
        )

    def _write_result(self, place: Path) -> None:
        settings, group = self.settings, self.group
        model = self.trainee.model
        assert isinstance(model, Qwen2Audio)
        if settings.adapter is not None:
            if group.first:
                try:
                    lora.save(model, place, settings.model)
                except CheckpointError as error:
                    raise CheckpointError(f"{error}{AGAIN}") from error
            return
        state = model.state_dict()
        if not group.first:  # all processes ask for the same tensors in the same order
            for tensor in state.values():
                parallel.whole(tensor)
            return
        try:
            saving.write(
                place,
                self.config,
                {name: tuple(tensor.shape) for name, tensor in state.items()},
                lambda name: parallel.whole(state[name]).to(torch.bfloat16),
                torch.bfloat16,
                saving.side_files(self.folder),
                overwrite=True,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}{AGAIN}") from error
