"""transformers and this package on one checkpoint and one question, module by module.

Module names here are the published checkpoint's, and those of transformers map onto them, so one
pair of hooks sees the same quantity on both sides. Ours runs first and leaves its activations;
transformers' are then compared as they appear, which makes their order the order of the report.
Inputs of modules are compared as well as outputs: between them lies the arithmetic that belongs to
no submodule, such as attention inside `self_attn` or the splice before the first decoder layer.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_core import chat, install, weights
from qwen2audio_core.assistant import find, user_turn
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import ClipLengths, clip_lengths
from qwen2audio_core.generate import generate
from qwen2audio_core.sampling import Settings
from qwen2audio_core.tokenizer import Tokenizer

# Largest difference over largest value that rounding may explain after the published depth. Ours
# computes fewer frames, so even equal arithmetic sums in another order. In float64 the limit is
# transformers', which keeps its norms and rotary angles in float32.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

# What the table shows. Everything else is watched too, to find the first divergence.
_SHOWN = re.compile(
    r"log-mel|prompt ids|audio_tower\.(conv[12]|layers\.\d+|layer_norm)"
    r"|multi_modal_projector\.linear|language_model\.(model\.(embed_tokens|layers\.\d+|norm)|lm_head)"
    r"|language_model\.model\.layers\.0 input"
)
_TITLES = {
    "audio_tower.layer_norm": "audio states",
    "multi_modal_projector.linear": "audio embeddings",
    "language_model.model.layers.0 input": "spliced embeddings",
    "language_model.lm_head": "logits",
}


@dataclass(frozen=True)
class Difference:
    """How far two tensors lie apart."""

    stage: str  # "log-mel", "prompt ids", a module's name, or that name and " input"
    largest: float  # max |ours - theirs|; inf where shapes differ or a value is not finite
    relative: float  # the same over max |theirs|


@dataclass
class Report:
    """What both did with one question."""

    model: str
    dtype: str
    tolerance: float  # on Difference.relative
    transformers: str  # its version
    ours: str = ""  # the answers, greedy with the checkpoint's penalty
    theirs: str = ""
    our_ids: list[int] = field(default_factory=list)
    their_ids: list[int] = field(default_factory=list)
    stages: list[Difference] = field(default_factory=list)
    first: Difference | None = None  # the first beyond the tolerance, of all that was watched

    @property
    def module(self) -> str | None:
        """Where the first divergence arose: the innermost module that holds it, or a stage."""
        if self.first is None:
            return None
        if not self.first.stage.endswith(" input"):
            return self.first.stage
        inside = self.first.stage.removesuffix(" input").rpartition(".")[0]
        return inside.removesuffix(".layers")  # a list of layers computes nothing itself

    @property
    def equal_ids(self) -> int:
        """How many tokens the answers share from the beginning."""
        pairs = zip(self.our_ids, self.their_ids, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(self.our_ids), len(self.their_ids)),
        )

    def verdict(self) -> str:
        """One or two lines: where they part, and how far the answers agree."""
        if self.first is None:
            text = f"everything agrees within {self.tolerance:g} of the largest value"
        else:
            text = f"first divergence in {self.module}, at {self.first.stage}:"
            text += f" {self.first.relative:.2e} of the largest value, over {self.tolerance:g}"
        longest = max(len(self.our_ids), len(self.their_ids))
        return f"{text}\nanswers: the first {self.equal_ids} of {longest} tokens are equal"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; an infinite difference is null, which JSON can hold."""
        content = asdict(self) | {"module": self.module, "equal_ids": self.equal_ids}
        for one in [*content["stages"], *([content["first"]] if self.first else [])]:
            for key in ("largest", "relative"):
                one[key] = None if one[key] == float("inf") else one[key]
        return content

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        title = f"{self.model}, {self.dtype}, against transformers {self.transformers}"
        table = Table(title=Text(title, "table.title"))
        table.add_column("stage", no_wrap=True)
        for title in ("difference", "relative", ""):
            table.add_column(title, justify="right")
        for one in self.stages:
            good = one.relative <= self.tolerance
            table.add_row(
                _TITLES.get(one.stage, one.stage),
                f"{one.largest:.2e}",
                f"{one.relative:.2e}",
                "ok" if good else "DIFFERS",
                style=None if good else "bold red",
            )
        yield table
        yield Text(self.verdict())
        yield Text(f"ours:         {self.ours}")
        yield Text(f"transformers: {self.theirs}")


def compare(
    folder: str | Path,
    clips: Sequence[Any] = (),
    text: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_new_tokens: int = 32,
    tolerance: float | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Report:
    """Answer one question twice, with this package and with transformers.

    folder     a checkpoint in the published layout, tokenizer and settings with it
    clips      whatever audio.load reads, or (samples, rate); one over 30 s becomes several
    text       the question, behind the clips
    dtype      None for the checkpoint's own
    tolerance  None for TOLERANCE[dtype]
    prepare    called with our model before it runs, to try a change against the reference
    errors     InputError without transformers; AudioError, PromptError, CheckpointError

    The two models are in memory one after the other; activations of the first stay, on the CPU.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "compare runs transformers beside this package, and it is not installed:"
            f" {install.package('transformers')}"
        ) from error
    folder = Path(folder)
    weights.refuse_codes(folder, "which transformers does not read; compare")
    tokenizer = Tokenizer.from_folder(folder)
    prompt = chat.encode([user_turn(text, list(clips))], tokenizer)
    config = Qwen2AudioConfig.from_json(folder / "config.json")
    chat.check_length(prompt, config.text.max_position_embeddings)
    lengths = [clip_lengths(clip.shape[0]) for clip in prompt.clips]
    published = weights.read_settings(folder)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        repetition_penalty=published.repetition_penalty,
        eos_token_ids=published.eos_token_ids,
        pad_token_id=published.pad_token_id,
    )

    batch = chat.collate(
        [prompt], settings.pad_token_id, device=device, num_mel_bins=config.audio.num_mel_bins
    )
    ours = weights.load_model(folder, device=device, dtype=dtype)
    if prepare is not None:
        prepare(ours)
    dtype = ours.language_model.model.embed_tokens.weight.dtype
    report = Report(
        folder.name,
        str(dtype).removeprefix("torch."),
        TOLERANCE[dtype] if tolerance is None else tolerance,
        transformers.__version__,
    )
    seen = {"prompt ids": batch.ids[0].cpu()}
    if batch.mel is not None:
        seen["log-mel"] = _valid("log-mel", batch.mel.cpu(), lengths)
    with torch.inference_mode(), _watch(ours, lengths, seen.setdefault):
        ours(batch.ids, batch.mel, batch.conv_frames)
    (answer,) = generate(ours, batch, settings)
    report.our_ids = answer.ids
    report.ours = tokenizer.decode(answer.ids)
    del ours

    def check(stage: str, theirs: Tensor) -> None:
        if stage not in seen:
            return
        difference = measure(stage, seen.pop(stage), theirs)
        if _SHOWN.fullmatch(stage):
            report.stages.append(difference)
        if report.first is None and difference.relative > report.tolerance:
            report.first = difference

    with _quiet(transformers):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        turn = [{"type": "audio", "audio": ""} for _ in prompt.clips]
        turn += [{"type": "text", "text": text}] if text else []
        written = processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        waveforms = [clip.numpy() for clip in prompt.clips]
        sound = {"audio": waveforms, "sampling_rate": 16_000} if waveforms else {}
        inputs = processor(text=written, return_tensors="pt", **sound)
        if waveforms:
            check("log-mel", _valid("log-mel", inputs["input_features"], lengths))
        check("prompt ids", inputs["input_ids"][0])
        theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
        theirs = theirs.to(device).eval()
        inputs = inputs.to(device)
        with torch.inference_mode():
            with _watch(theirs, lengths, check):
                theirs(**inputs)
            ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    report.their_ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
    report.theirs = tokenizer.decode(report.their_ids)
    if seen:
        raise AssertionError(f"transformers {transformers.__version__} has no {sorted(seen)[0]}")
    return report


def run(
    model: str,
    audio: Sequence[str] = (),
    text: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 32,
    as_json: bool = False,
) -> int:
    """Compare, print the report, and return the exit code: 0 where all agrees, 1 where not."""
    folder = find(model)
    report = compare(
        folder,
        audio,
        text,
        device=device or "cpu",
        dtype=None if dtype is None else getattr(torch, dtype),
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        import rich

        rich.print(report)
    return 0 if report.first is None else 1


def measure(stage: str, ours: Tensor, theirs: Tensor) -> Difference:
    """Compare two tensors of one quantity."""
    if ours.shape != theirs.shape:
        return Difference(stage, float("inf"), float("inf"))
    if not ours.numel():
        return Difference(stage, 0.0, 0.0)
    wide = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = ours.to(wide), theirs.to(wide)
    largest = (ours - theirs).abs().nan_to_num(float("inf")).max().item()
    scale = theirs.abs().max().item()  # NaN or infinite only where the difference is infinite
    relative = largest / scale if scale and math.isfinite(largest) else float("inf")
    return Difference(stage, largest, relative if largest else 0.0)


@contextmanager
def _watch(
    model: nn.Module, lengths: list[ClipLengths], report: Callable[[str, Tensor], Any]
) -> Iterator[None]:
    """Call report(stage, tensor) with every module's input and output, under published names."""
    handles = []

    def tell(stage: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor) and value.is_floating_point():
            report(stage, _valid(stage, value.detach().cpu(), lengths))

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tell(f"{name} input", args[0] if args else kwargs.get("hidden_states"))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tell(name, output)

        return hook

    try:
        for path, module in model.named_modules():
            # A dot behind the path makes it look like a tensor's name, which is what is mapped.
            name = weights.published_name(path + ".").removesuffix(".")
            # The trunk as a whole is named in only one of the two trees, and ends in its norm.
            if "." in name and name != "language_model.model":
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _valid(stage: str, tensor: Tensor, lengths: list[ClipLengths]) -> Tensor:
    """The part of an activation that belongs to the clips or, in the decoder, all of it.

    Audio activations are (n, frames, width), or (n, width, frames) around the convolutions;
    returned are the valid frames of all clips, one behind the other, (frames, width).
    """
    name = stage.removesuffix(" input")
    if stage in ("log-mel", "audio_tower.conv1 input"):
        counts = [one.input_frames for one in lengths]
    elif stage in ("audio_tower.conv1", "audio_tower.conv2 input"):
        counts = [2 * one.conv_frames for one in lengths]  # those that conv2's valid frames see
    elif name.startswith("audio_tower.layers") or stage == "audio_tower.conv2":
        counts = [one.conv_frames for one in lengths]
    elif name.startswith(("audio_tower", "multi_modal_projector")):
        counts = [one.audio_tokens for one in lengths]
    else:
        return tensor
    if stage == "log-mel" or name.startswith("audio_tower.conv"):
        tensor = tensor.transpose(1, 2)
    return torch.cat([row[:count] for row, count in zip(tensor, counts, strict=True)])


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the reference's progress bars and advice out of the report."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
