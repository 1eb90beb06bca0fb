"""Keys and values per layer and chunk, owned by whoever drives the transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class ChunkKVCache:
    """One slot `[batch, chunk tokens, kv heads, 2 * head dim]` per layer and chunk, K (rotated) then V.

    A slot holds what was written last: noisy keys while a chunk is denoised, its clean keys afterwards.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], Tensor] = {}

    def write(self, layer: int, chunk: int, key_value: Tensor, rows: Tensor | None = None) -> None:
        """Replace a slot, or some of its rows.

        Args:
            layer, chunk: which slot.
            key_value: `[batch, tokens, kv heads, 2 * head dim]`.
            rows: `[tokens]` indices inside the chunk; None replaces the whole slot.

        Raises:
            KeyError: rows of a slot that was never written as a whole.
        """
        if rows is None:
            self._slots[layer, chunk] = key_value
        else:
            self._slots[layer, chunk].index_copy_(1, rows, key_value)

    def read(self, layer: int, start: int, end: int) -> list[Tensor]:
        """The slots of chunks `start` to `end - 1`; a chunk that was never written raises KeyError."""
        return [self._slots[layer, chunk] for chunk in range(start, end)]

    def drop_before(self, chunk: int) -> None:
        """Free the slots of all chunks before `chunk`."""
        for key in [key for key in self._slots if key[1] < chunk]:
            del self._slots[key]

    @property
    def chunks(self) -> set[int]:
        """Chunks that hold keys and values."""
        return {chunk for _, chunk in self._slots}


@dataclass(frozen=True)
class ChunkKVView:
    """What one chunk's forward sees: it writes its own slot and attends to a range of chunks that ends with itself.

    Attributes:
        own: cache of this pass; takes the new keys and values.
        history: cache that holds the chunks before `own_from`. The same object as `own` in the pass that keeps it.
        chunk: index of the chunk.
        start: first chunk attended to.
        own_from: first chunk whose keys come from this pass.
        rows: `[tokens]` indices when the forward runs some of the chunk's tokens, None for all.
    """

    own: ChunkKVCache
    history: ChunkKVCache
    chunk: int
    start: int
    own_from: int
    rows: Tensor | None = None

    def update(self, layer: int, key_value: Tensor) -> Tensor:
        """Store `[batch, tokens, kv heads, 2 * head dim]`, return the rows of the whole range."""
        self.own.write(layer, self.chunk, key_value, self.rows)
        border = min(max(self.own_from, self.start), self.chunk)
        seen = [
            *self.history.read(layer, self.start, border),
            *self.own.read(layer, border, self.chunk + 1),
        ]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)


class OwnKeysOnly:
    """For a chunk that attends to nothing but itself and leaves no trace."""

    def update(self, layer: int, key_value: Tensor) -> Tensor:
        """Return what was given."""
        return key_value
