"""Keys and values of the tokens already read, kept so that each is computed once."""

import torch
from torch import Tensor

from qwen2audio_core.config import TextConfig


class KVCache:
    """Preallocated keys and values of every layer. The caller advances it, after all layers wrote.

    keys, values  (layers, B, capacity, G, C)
    length        positions filled so far, the same for every row: rows are padded at the left
    key_start     (B,) first real position of each row, None where no row is padded
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (
            config.num_hidden_layers,
            batch,
            capacity,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.key_start: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, T, G, C) behind the filled part; return all of both (B, S, G, C)."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked for")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as filled."""
        self.length += tokens

    def take(self, other: "KVCache", length: int) -> None:
        """Begin with a copy of the first positions of another one, of as many rows, unpadded."""
        self.keys[:, :, :length] = other.keys[:, :, :length]
        self.values[:, :, :length] = other.values[:, :, :length]
        self.length = length

    def empty(self) -> None:
        """Give its memory back. It holds nothing from then on."""
        self.keys, self.values = (x[:, :, :0].clone() for x in (self.keys, self.values))
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Keep the rows (n,) of the batch, in that order; a row may be taken several times."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        if self.key_start is not None:
            self.key_start = self.key_start[rows]
