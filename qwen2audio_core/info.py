"""What a checkpoint is and what it needs, without reading its weights: `qwen2audio info`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen2audio_core import hub, weights
from qwen2audio_core.assistant import find
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError
from qwen2audio_core.frontend import MAX_SAMPLES, SECONDS_PER_TOKEN, clip_lengths
from qwen2audio_core.model import Qwen2Audio

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
        table.add_row("weights", f"{_bytes(self.weight_bytes)} in {self.files} files")
        table.add_row("a second of audio", f"{self.tokens_per_second:g} tokens")
        table.add_row("a window of 30 s", f"{self.tokens_per_window} tokens")
        table.add_row("context", f"{self.context_tokens:,} tokens", end_section=True)
        window = self.tokens_per_window + 256
        for name, tokens in (
            ("memory to answer about 30 s", window),
            ("memory at full context", self.context_tokens),
        ):
            table.add_row(name, _bytes(self.weight_bytes + tokens * self.cache_bytes_per_token))
        yield table
        yield Text(self.folder)


def describe(model: str) -> Info:
    """Read a checkpoint's config and headers; of one on the hub, the small files alone.

    model   hub id, folder or "tiny"
    errors  CheckpointError
    """
    folder = find(model, weights=False)
    config = Qwen2AudioConfig.from_json(hub.inside(folder, "config.json"))
    with torch.device("meta"):
        shape = Qwen2Audio(config)
    parameters = {part: _count(shape, part) for part in PARTS}
    total = sum(parameters.values())
    downloaded = hub.complete(folder)
    if downloaded:
        stored = weights.read_headers(folder)
        dtypes: dict[str, int] = {}
        for entry in stored.values():
            name = str(weights.DTYPES.get(entry.dtype, entry.dtype)).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + 1
        size = sum(entry.bytes for entry in stored.values())
        tensors, files = len(stored), len({entry.file for entry in stored.values()})
    else:
        listed = hub.weight_map(folder)
        dtypes, tensors, files = {}, len(listed), len(set(listed.values()))
        size = hub.read_json(folder, hub.INDEX).get("metadata", {}).get("total_size")
        if not isinstance(size, int):
            raise CheckpointError(f"{folder / hub.INDEX}: metadata.total_size must be a number")
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
        dtypes,
        1 / SECONDS_PER_TOKEN,
        clip_lengths(MAX_SAMPLES).audio_tokens,
        text.max_position_embeddings,
        round(cache * size / total),
    )


def _count(model: Qwen2Audio, part: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(part).parameters())


def _shown(folder: Path) -> str:
    return str(folder.absolute())


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"
