"""The loop: batches in, weights out. One for all three stages."""

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core import chat, hub, ops, saving, weights
from qwen2audio_core.errors import InputError
from qwen2audio_core.generate import generate
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.sampling import Settings as Sampling
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training import checkpoint, losses
from qwen2audio_core.training.data import Batch, Example, Masking, Rows, collate, encode, plan


@dataclass
class Settings:
    """Everything a run depends on. A run is repeated by the same settings on the same data."""

    model: str  # folder or hub id to begin with
    data: list[str]  # jsonl
    out: str
    valid: str | None = None  # jsonl
    steps: int | None = None  # the run ends after so many
    minutes: float | None = None  # or after so long; the schedule follows whichever is nearer
    lr: float = 1e-4
    warmup: int = 100  # steps in which the rate rises from 0
    floor: float = 0.0  # the rate at the end, as a part of lr
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0  # largest norm of the gradient
    batch_seconds: float = 96.0
    batch_tokens: int = 8192
    accumulate: int = 1  # batches in a step
    short_first: int = 0  # batches of the first epoch in order of length
    ctc_weight: float = 0.0  # of the auxiliary loss on the encoder
    ctc_until: float = 1.0  # it falls linearly to 0 at this part of the run
    masking: bool = False  # SpecAugment
    bf16: bool = True  # autocast; the weights stay in float32
    save_every: int = 500
    keep: int = 2
    eval_every: int = 500
    eval_rows: int = 256
    samples: int = 64  # answers written at every evaluation
    seed: int = 0
    device: str = "cpu"


class Trainee(nn.Module):
    """The model, and a head for the auxiliary loss that is not part of it.

    alphabet   characters of the transcripts; class i + 1 is alphabet[i], 0 the blank
    """

    def __init__(self, model: Qwen2Audio, alphabet: str):
        super().__init__()
        self.model = model
        self.alphabet = {character: i for i, character in enumerate(alphabet, start=1)}
        if alphabet:
            self.ctc_head = nn.Linear(model.config.audio.d_model, len(alphabet) + 1)
            self._states: Tensor | None = None
            model.audio_tower.layers[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._states = output  # (n, T, Da), 50 a second

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch: "loss" of next tokens and, with a head for it, "ctc" of clips."""
        model = self.model
        x = model.hidden(model.embed(batch.ids, batch.mel, batch.conv_frames))
        x, labels = losses.supervised(x, batch.labels)
        found = {"loss": losses.next_token(model.language_model.lm_head(x), labels)}
        if self.alphabet and batch.spoken:
            found["ctc"] = self._ctc(batch)
        self._states = None
        return found

    def _ctc(self, batch: Batch) -> Tensor:
        assert self._states is not None and batch.conv_frames is not None
        clips = torch.tensor([clip for clip, _ in batch.spoken])
        texts = [[self.alphabet[c] for c in text if c in self.alphabet] for _, text in batch.spoken]
        lengths = torch.tensor([len(text) for text in texts])
        targets = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for row, text in zip(targets, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        states = self._states[clips]
        states = F.layer_norm(states, states.shape[-1:])
        return losses.ctc(self.ctc_head(states), batch.conv_frames[clips], targets, lengths)


def train(settings: Settings) -> Path:
    """Run to the end, from the newest checkpoint in settings.out if there is one.

    returns  the folder of the trained model, in the published layout
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    _keep_memory()
    torch.manual_seed(settings.seed)
    folder = hub.find(settings.model)
    tokenizer = Tokenizer.from_folder(folder)
    model = weights.load_model(folder, device=settings.device, dtype=torch.float32).train()
    _requires_storage(model)
    if settings.device == "cpu":
        for module in model.modules():
            if hasattr(module, "attention_op"):
                setattr(module, "attention_op", ops.attention_by_products)  # noqa: B010
    rows = Rows(settings.data, count_characters=settings.ctc_weight > 0)
    for line in rows.bad[:10]:
        print(line, file=sys.stderr)
    if not len(rows):
        raise InputError(f"{', '.join(settings.data)}: no usable row")
    alphabet = "".join(sorted(c for c, _ in rows.characters.most_common(4000)))
    trainee = Trainee(model, alphabet)
    optimizer = _optimizer(trainee, settings)
    run = Run(settings, folder, tokenizer, trainee, optimizer, rows)
    print(
        f"{len(rows):,} rows, {float(rows.seconds.sum()) / 3600:.2f} h of audio,"
        f" {len(rows.bad)} bad rows; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        f" parameters; {len(alphabet)} characters",
        file=sys.stderr,
        flush=True,
    )
    done = checkpoint.checkpoints(out)
    if done:
        run.restore(done[-1])
    run.go()
    return out / "model"


def _requires_storage(model: nn.Module) -> None:
    """Give every parameter memory of its own: mapped pages of a file are copied on every write."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _optimizer(trainee: nn.Module, settings: Settings) -> torch.optim.AdamW:
    trained = [p for p in trainee.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def _keep_memory() -> None:
    """Let the C library keep freed memory: it gives large blocks back at once otherwise, and a step
    on a CPU then spends more than half of its time in page faults."""
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
    """How far a run has come. What a resumed run cannot work out from its settings."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, the next one to use
    seconds: float = 0.0  # of wall clock, pauses between runs left out
    audio_seconds: float = 0.0
    tokens: int = 0


class Run:
    def __init__(
        self,
        settings: Settings,
        folder: Path,
        tokenizer: Tokenizer,
        trainee: Trainee,
        optimizer: torch.optim.AdamW,
        rows: Rows,
    ):
        self.settings = settings
        self.folder = folder
        self.tokenizer = tokenizer
        self.trainee = trainee
        self.optimizer = optimizer
        self.rows = rows
        self.progress = Progress()
        self.out = Path(settings.out)
        self.valid = Rows([settings.valid]) if settings.valid else None
        self.pad_id = tokenizer.id_of("<|endoftext|>")
        self._batches: tuple[int, list[list[int]]] = (-1, [])
        self._began = 0.0

    def restore(self, place: Path) -> None:
        found = checkpoint.load(place, self.trainee, self.optimizer)
        self.progress = Progress(**found)
        print(f"going on from {place}", file=sys.stderr, flush=True)

    def go(self) -> None:
        settings, progress = self.settings, self.progress
        self._began = time.perf_counter() - progress.seconds
        shown = time.perf_counter()
        recent: list[dict[str, float]] = []
        batches = self.batches()
        while self.part() < 1:
            lr = self._set_rate()
            step_began = time.perf_counter()
            figures = self.step([next(batches) for _ in range(settings.accumulate)])
            progress.step += 1
            progress.seconds = time.perf_counter() - self._began
            figures |= {"lr": lr, "step_seconds": time.perf_counter() - step_began}
            recent.append(figures)
            last = self.part() >= 1
            if time.perf_counter() - shown > 10 or last:
                shown = time.perf_counter()
                mean = {
                    key: sum(f.get(key, 0.0) for f in recent) / len(recent) for key in recent[-1]
                }
                self.log("train", mean)
                recent = []
            if progress.step % settings.eval_every == 0 or last:
                self.evaluate()
            if progress.step % settings.save_every == 0 or last:
                self.save()

    def part(self) -> float:
        """How much of the run is over, 0 to 1."""
        settings, progress = self.settings, self.progress
        parts = [0.0]
        if settings.steps:
            parts.append(progress.step / settings.steps)
        if settings.minutes:
            parts.append((time.perf_counter() - self._began) / (60 * settings.minutes))
        return min(1.0, max(parts))

    def _set_rate(self) -> float:
        settings = self.settings
        shape = 0.5 * (1 + math.cos(math.pi * self.part()))
        shape = settings.floor + (1 - settings.floor) * shape
        lr = settings.lr * shape * min(1.0, (self.progress.step + 1) / max(1, settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def batches(self) -> Iterator[Batch]:
        settings, progress = self.settings, self.progress
        while True:
            planned = plan(
                self.rows,
                progress.epoch,
                batch_seconds=settings.batch_seconds,
                batch_tokens=settings.batch_tokens,
                seed=settings.seed,
                short_first=settings.short_first,
            )
            while progress.batch < len(planned):
                numbers = planned[progress.batch]
                draw = hash((settings.seed, progress.epoch, progress.batch)) % 2**62
                progress.batch += 1
                examples = self._examples(self.rows, numbers)
                if examples:
                    yield self._collate(examples, torch.Generator().manual_seed(draw))
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _examples(self, rows: Rows, numbers: list[int]) -> list[Example]:
        examples = []
        for number in numbers:
            try:
                examples.append(encode(rows[number], self.tokenizer))
            except InputError as error:
                print(error, file=sys.stderr)
        return examples

    def _collate(self, examples: list[Example], generator: torch.Generator | None) -> Batch:
        masking = Masking() if self.settings.masking and generator is not None else None
        bins = self.trainee.model.config.audio.num_mel_bins
        return collate(
            examples, self.pad_id, num_mel_bins=bins, masking=masking, generator=generator
        )

    def step(self, batches: list[Batch]) -> dict[str, float]:
        settings = self.settings
        positions = sum(batch.supervised for batch in batches)
        spoken = sum(len(batch.spoken) for batch in batches)
        ctc_weight = settings.ctc_weight * max(0.0, 1 - self.part() / settings.ctc_until)
        self.trainee.train()
        figures = {"loss": 0.0, "ctc": 0.0, "audio_seconds": 0.0, "tokens": 0.0}
        for batch in batches:
            with self._autocast():
                sums = self.trainee(batch)
            loss = sums["loss"] / max(1, positions)
            figures["loss"] += float(loss.detach())
            if "ctc" in sums:
                auxiliary = sums["ctc"] / max(1, spoken)
                figures["ctc"] += float(auxiliary.detach())
                loss = loss + ctc_weight * auxiliary
            loss.backward()
            figures["audio_seconds"] += batch.seconds
            figures["tokens"] += batch.tokens
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), settings.clip)
        figures["norm"] = float(norm)
        if math.isfinite(figures["norm"]):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.audio_seconds += figures["audio_seconds"]
        self.progress.tokens += int(figures["tokens"])
        return figures

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = torch.device(self.settings.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.settings.bf16)

    def log(self, kind: str, figures: dict[str, Any]) -> None:
        progress = self.progress
        line = {"kind": kind, **asdict(progress), **figures}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        numbers = " ".join(
            f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)
        )
        print(
            f"{kind} step {progress.step} epoch {progress.epoch}"
            f" {progress.seconds / 60:.1f} min: {numbers}",
            file=sys.stderr,
            flush=True,
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss on the validation rows, and some answers beside what they should be."""
        if self.valid is None or not len(self.valid):
            return
        settings, rows = self.settings, self.valid
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(rows), generator=generator)[: settings.eval_rows].tolist()
        chosen.sort(key=lambda i: float(rows.seconds[i]))
        self.trainee.eval()
        total, positions = 0.0, 0
        for at in range(0, len(chosen), 32):
            batch = self._collate(self._examples(rows, chosen[at : at + 32]), None)
            with self._autocast():
                total += float(self.trainee(batch)["loss"])
            positions += batch.supervised
        figures: dict[str, Any] = {"valid_loss": total / max(1, positions)}
        shown = chosen[:: max(1, len(chosen) // max(1, settings.samples))][: settings.samples]
        examples = self._examples(rows, shown)
        if examples:
            figures |= self._samples(examples)
        self.log("valid", figures)
        self.trainee.train()

    def _samples(self, examples: list[Example]) -> dict[str, Any]:
        """Greedy answers to the first turn of each row."""
        prompts, wanted = [], []
        for example in examples:
            begin, end = example.answers[0]
            ids = example.ids[:begin]
            clips = example.clips[: _runs(ids, self.trainee.model.config.audio_token_id)]
            prompts.append(chat.Prompt(ids, clips, [], []))
            wanted.append(self.tokenizer.decode(example.ids[begin:end]))
        ends = (self.pad_id, self.tokenizer.id_of("<|im_end|>"))
        sampling = replace(
            Sampling(), max_new_tokens=48, eos_token_ids=ends, pad_token_id=self.pad_id
        )
        said = []
        for at in range(0, len(prompts), 32):
            bins = self.trainee.model.config.audio.num_mel_bins
            batch = chat.collate(prompts[at : at + 32], self.pad_id, num_mel_bins=bins)
            answers = generate(self.trainee.model, batch, sampling)
            said += [self.tokenizer.decode(answer.ids) for answer in answers]
        pairs = list(zip(examples, wanted, said, strict=True))
        spoken = [(w, s) for example, w, s in pairs if example.row.transcript]
        wrong = sum(edit_distance(w, s) for w, s in spoken)
        figures: dict[str, Any] = {
            "exact": sum(w.strip() == s.strip() for _, w, s in pairs) / len(pairs),
            "samples": [[example.row.source, w, s] for example, w, s in pairs[:24]],
        }
        if spoken:
            figures["cer"] = wrong / max(1, sum(len(w) for w, _ in spoken))
        for source, wanted_text, said_text in figures["samples"][:8]:
            print(f"   {source}: {wanted_text!r} -> {said_text!r}", file=sys.stderr)
        return figures

    def save(self) -> None:
        checkpoint.save(
            self.out, asdict(self.progress), self.trainee, self.optimizer, self.settings.keep
        )
        saving.save_model(
            self.trainee.model,
            self.out / "model",
            dtype=torch.bfloat16,
            companions=self.folder,
            overwrite=True,
        )


def _runs(ids: list[int], token: int) -> int:
    """How many unbroken runs of a token there are."""
    return sum(
        now == token and before != token for before, now in zip([-1, *ids], ids, strict=False)
    )


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
