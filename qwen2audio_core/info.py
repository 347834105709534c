"""What a checkpoint is and what it needs, without reading its weights: `qwen2audio info`."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen2audio_core import hub, weights
from qwen2audio_core.assistant import find
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.frontend import MAX_SAMPLES, SECONDS_PER_TOKEN, clip_lengths
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.quantize import SCHEMES, lay_out, linear_paths, stored_bytes

PARTS = ("audio_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head")


@dataclass(frozen=True)
class Info:
    """Counts in tensors, parameters, bytes and tokens."""

    model: str
    folder: str
    downloaded: bool  # False: known from the hub's small files alone
    tensors: int
    files: int
    parameters: dict[str, int]  # part -> count
    weight_bytes: int
    quantised: str | None  # how; None where the weights are as published
    quantised_bytes: dict[str, int]  # what they would take, by the name of --quantize
    plain_bytes: int  # what they would take unquantised
    dtypes: dict[str, int]  # dtype -> tensors; empty where not downloaded
    tokens_per_second: float  # of audio
    tokens_per_window: int  # of 30 s
    context_tokens: int
    cache_bytes_per_token: int  # keys and values of all layers, in the checkpoint's dtype

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.model, "table.title"), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right")
        for part, count in self.parameters.items():
            table.add_row(part, f"{count:,} parameters")
        table.add_row("together", f"{sum(self.parameters.values()):,} parameters", end_section=True)
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        table.add_row("tensors", Text(kinds or f"{self.tensors}, not downloaded yet"))
        files = f"{self.files} file{'s' * (self.files != 1)}"
        table.add_row("weights", f"{in_bytes(self.weight_bytes)} in {files}")
        if self.quantised:
            ratio = self.plain_bytes / self.weight_bytes
            table.add_row(
                self.quantised, f"{ratio:.2g} times less than {in_bytes(self.plain_bytes)}"
            )
        for name, size in self.quantised_bytes.items():
            table.add_row(f"with --quantize {name}", in_bytes(size))
        table.add_row("a second of audio", f"{self.tokens_per_second:g} tokens")
        table.add_row("a window of 30 s", f"{self.tokens_per_window} tokens")
        table.add_row("context", f"{self.context_tokens:,} tokens", end_section=True)
        window = self.tokens_per_window + 256
        for name, tokens in (
            ("memory to answer about 30 s", window),
            ("memory at full context", self.context_tokens),
        ):
            table.add_row(name, in_bytes(self.weight_bytes + tokens * self.cache_bytes_per_token))
        yield table
        yield Text(self.folder)


def describe(model: str) -> Info:
    """Read a checkpoint's config and headers; of one on the hub, the small files alone.

    model   hub id, folder or "tiny"
    errors  CheckpointError
    """
    folder = find(model, weights=False)
    config = Qwen2AudioConfig.from_json(hub.inside(folder, "config.json"))
    shape = weights.without_storage(config)
    parameters = {part: _count(shape, part) for part in PARTS}
    total = sum(parameters.values())
    downloaded = hub.complete(folder)
    scheme = weights.read_scheme(folder)
    if downloaded:
        stored = weights.read_headers(folder)
        dtypes: dict[str, int] = {}
        for entry in stored.values():
            name = weights.plain(entry.kind) if entry.kind else entry.dtype
            dtypes[name] = dtypes.get(name, 0) + 1
        size = sum(entry.bytes for entry in stored.values())
        tensors, files = len(stored), len({entry.file for entry in stored.values()})
    else:
        listed = hub.weight_map(folder)
        dtypes, tensors, files = {}, len(listed), len(set(listed.values()))
        size = hub.read_json(folder, hub.INDEX).get("metadata", {}).get("total_size")
        if not isinstance(size, int):
            raise CheckpointError(f"{folder / hub.INDEX}: metadata.total_size must be a number")
    itemsize = size / total
    if scheme is not None:  # numbers that are no codes are stored as the model computes
        kind = hub.read_json(folder, "config.json").get("torch_dtype")
        kinds = {weights.plain(dtype): dtype for dtype in weights.DTYPES.values()}
        itemsize = kinds.get(str(kind), torch.bfloat16).itemsize
    text = config.text
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return Info(
        model,
        _shown(folder),
        downloaded,
        tensors,
        files,
        parameters,
        size,
        None if scheme is None else str(scheme),
        {} if scheme else _when_quantised(shape, round(itemsize)),
        round(itemsize * total),
        dtypes,
        1 / SECONDS_PER_TOKEN,
        clip_lengths(MAX_SAMPLES).audio_tokens,
        text.max_position_embeddings,
        round(cache * itemsize),
    )


def _when_quantised(shape: Qwen2Audio, itemsize: int) -> dict[str, int]:
    """What the weights would take in each scheme that they can be brought into."""
    sizes = {}
    for name, scheme in SCHEMES.items():
        try:
            lay_out(other := copy.deepcopy(shape), linear_paths(other), scheme)
        except InputError:
            continue
        sizes[name] = stored_bytes(other, itemsize)
    return sizes


def _count(model: Qwen2Audio, part: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(part).parameters())


def _shown(folder: Path) -> str:
    return str(folder.absolute())


def in_bytes(count: int) -> str:
    """A size to read: 6.3 GB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"
