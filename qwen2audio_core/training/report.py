"""What a person sees of a run: a line of figures, a jsonl log, curves, and answers to read."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen2audio_core import chat, install
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.generate import generate
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training.data import Example

EVERY = 10.0  # s between lines
LOG = "log.jsonl"


class Report:
    """Writes out/log.jsonl and lines on stderr."""

    def __init__(self, out: Path, tensorboard: bool = False, quiet: bool = False):
        self.out, self.quiet = out, quiet
        self._recent: list[dict[str, float]] = []
        self._shown = time.perf_counter()
        self._told: set[str] = set()
        self._board: Any = None
        if tensorboard and not quiet:
            self._board = _board(out)

    def note(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """A note on a row, from any process: each of them meets other ones. Once: every row comes
        again in every epoch."""
        if line not in self._told:
            self._told.add(line)
            print(line, file=sys.stderr, flush=True)

    def step(self, progress: dict[str, Any], figures: dict[str, float], part: float) -> None:
        """Called after every step; writes the mean of the steps since the last line."""
        self._recent.append(figures)
        now = time.perf_counter()
        if now - self._shown < EVERY and part < 1 and progress["step"] > 1:
            return
        recent, self._recent = self._recent, []
        total = {key: sum(f.get(key, 0.0) for f in recent) for key in recent[-1]}
        means = {key: value / len(recent) for key, value in total.items()}
        spent = max(1e-9, total["step_seconds"])
        means |= {
            "audio_per_second": total["audio_seconds"] / spent,
            "tokens_per_second": total["tokens"] / spent,
            "memory_gb": _memory(),
        }
        self._shown = now
        for key in ("audio_seconds", "tokens"):  # progress has those of the whole run
            del means[key]
        self._write("train", progress, means)
        left = progress["seconds"] * (1 - part) / part if part > 0 else float("inf")
        extra = "".join(
            f"  {key} {means[key]:.3f}"
            for key in ("ctc", "sounds", "right", "attend", "won", "margin")
            if key in means
        )
        self.note(
            f"step {progress['step']}  {100 * part:.0f} %  loss {means['loss']:.4f}{extra}"
            f"  lr {means['lr']:.2e}  {means['tokens_per_second']:.0f} tokens/s"
            f"  {means['audio_per_second']:.0f} s of audio/s  {means['memory_gb']:.1f} GB"
            f"  {left / 60:.0f} min left"
        )

    def evaluation(self, progress: dict[str, Any], figures: dict[str, Any]) -> None:
        if not figures:
            return
        self._write("valid", progress, figures)
        numbers = [f"{key} {value:.4f}" for key, value in figures.items() if key != "samples"]
        self.note(f"step {progress['step']}  " + "  ".join(numbers))
        for source, wanted, said in figures.get("samples", [])[:8]:
            self.note(f"    {source}: {wanted!r} -> {said!r}")

    def _write(self, kind: str, progress: dict[str, Any], figures: dict[str, Any]) -> None:
        if self.quiet:
            return
        known = {key: value for key, value in progress.items() if isinstance(value, (int, float))}
        figures = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()
        }
        line = json.dumps({"kind": kind, **known, **figures}, ensure_ascii=False)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.out / LOG}: cannot write it ({error.strerror})"
            ) from error
        if self._board is not None:
            for key, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{key}", value, progress["step"])
            self._board.flush()  # a run that is killed keeps what the log keeps

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will take again."""
        path = self.out / LOG
        if self.quiet or not path.exists():
            return
        if self._board is not None:
            self._board.close()
            self._board = _board(self.out, step + 1)
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (
                ValueError,
                KeyError,
            ):  # the line that was being written when the run was killed
                continue
        part = path.with_suffix(".part")
        try:
            part.write_text("".join(kept), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: cannot write it ({error.strerror})") from error

    def finish(self) -> None:
        if self._board is not None:
            self._board.close()
        if self.quiet or not (self.out / LOG).exists():
            return
        file = self.out / "loss.png"
        try:
            if plot(self.out) is None:
                self.note(f"{file} was not drawn, that needs matplotlib: {install.extra('train')}")
        except (OSError, ValueError) as error:  # all that was trained is written
            self.note(f"{file} was not drawn ({getattr(error, 'strerror', None) or error})")


def _board(out: Path, forgotten: int | None = None) -> Any:
    """A writer of out/tensorboard; curves of earlier runs end before step `forgotten`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the package tensorboard: {install.extra('train')}"
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=forgotten)


def plot(out: Path) -> Path | None:
    """Draw the losses of out/log.jsonl to out/loss.png; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, key in (
        ("train", "loss"),
        ("train", "ctc"),
        ("train", "sounds"),
        ("train", "attend"),
        ("valid", "valid_loss"),
    ):
        points = [
            (line["step"], line[key])
            for line in lines
            if line["kind"] == kind and line.get(key) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if kind == "valid" else "")
    axes.set(xlabel="step", ylabel="nats a token", title=out.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    return out / "loss.png"


def _memory() -> float:
    """The most this process has held, GB: of the GPU where there is one. 0 where no one says."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def samples(
    model: Qwen2Audio, tokenizer: Tokenizer, batches: Sequence[Sequence[Example]]
) -> dict[str, Any]:
    """Greedy answers to the first turn of each row, half as long again as they should be at most.

    returns  "exact", the part that is right to the letter; "cer", wrong characters of transcripts;
             "samples", [source, wanted, said] of the first 24
    """
    pad = tokenizer.id_of("<|endoftext|>")
    ends = (pad, tokenizer.id_of("<|im_end|>"))
    bins = model.config.audio.num_mel_bins
    triples: list[tuple[Example, str, str]] = []
    for examples in batches:
        prompts, wanted, longest = [], [], 0
        for example in examples:
            begin, end = example.answers[0]
            ids = example.ids[:begin]
            clips = example.clips[: _runs(ids, model.config.audio_token_id)]
            prompts.append(chat.Prompt(ids, clips, [], []))
            wanted.append(tokenizer.decode(example.ids[begin:end]))
            longest = max(longest, end - begin)
        most = max(64, longest + longest // 2)
        settings = Settings(max_new_tokens=most, eos_token_ids=ends, pad_token_id=pad)
        batch = chat.collate(prompts, pad, num_mel_bins=bins)
        said = [tokenizer.decode(answer.ids) for answer in generate(model, batch, settings)]
        triples += zip(examples, wanted, said, strict=True)
    spoken = [(right, text) for example, right, text in triples if example.row.transcript]
    found: dict[str, Any] = {
        "exact": sum(right.strip() == text.strip() for _, right, text in triples) / len(triples)
    }
    if spoken:
        wrong = sum(edit_distance(right, text) for right, text in spoken)
        found["cer"] = wrong / max(1, sum(len(right) for right, _ in spoken))
    found["samples"] = [[example.row.source, right, text] for example, right, text in triples[:24]]
    return found


def _runs(ids: Sequence[int], token: int) -> int:
    """How many unbroken runs of a token there are."""
    before = [-1, *ids]
    return sum(now == token and last != token for last, now in zip(before, ids, strict=False))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
