"""Keys and values per layer and chunk, owned by whoever drives the transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.cache.compression import Compression, gather
from common.cache.kv_line import KeyValueLine


class ChunkKVCache:
    """One slot `[batch, chunk tokens, kv heads, 2 * head dim]` per layer and chunk, K (rotated) then V.

    A slot holds what was written last: noisy keys while a chunk is denoised, its clean keys afterwards. With
    compression, the clean chunks of a layer are merged into one pool of bounded size as soon as they exceed it.

    Attributes:
        compression: what bounds the clean chunks; None keeps them all. To be set before the first clean one.
        storage: device that holds everything between uses; None leaves it where it was computed.
    """

    def __init__(self) -> None:
        self.compression: Compression | None = None
        self.storage: torch.device | None = None
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._pools: dict[int, Tensor] = {}  # by layer
        self._pooled: dict[int, int] = {}  # by layer, the first chunk that is not in the pool

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
            self._slots[layer, chunk] = self._stored(key_value)
            return
        slot = self._slots[layer, chunk]
        new, rows = key_value.to(slot.device), rows.to(slot.device)
        slot.index_copy_(1, rows, new)

    def read(self, layer: int, start: int, end: int) -> list[Tensor]:
        """Rows of the chunks `start` to `end - 1`; a chunk that was never written raises KeyError.

        Chunks that are in the pool are represented by its latest rows, as many as the chunks had.
        """
        first = self._pooled.get(layer, 0)
        slots = [self._slots[layer, chunk] for chunk in range(max(start, first), end)]
        if start >= first:
            return slots
        pool = self._pools[layer]
        wanted = (first - start) * self.compression.chunk
        return [pool[:, -wanted:], *slots]

    def length(self, start: int, end: int, chunk_tokens: int) -> int:
        """Tokens that `read` returns for chunks of `chunk_tokens`, whether the last is written yet or not."""
        first = self._pooled.get(0, 0)
        pooled = 0 if start >= first else min(self._pools[0].shape[1], (first - start) * chunk_tokens)
        return pooled + (end - max(start, first)) * chunk_tokens

    def compress(self, layer: int, chunk: int, query: Tensor) -> None:
        """Merge a layer's clean chunks into the pool, if together they exceed the budget.

        Args:
            layer: which layer.
            chunk: the newest clean chunk. Its slot and all before it are final.
            query: `[batch, tokens, query heads, head dim]`, rotated, of that chunk.
        """
        if self.compression is None:
            return
        clean = sorted(c for where, c in self._slots if where == layer and c <= chunk)
        parts = [self._slots[layer, c] for c in clean]
        if layer in self._pools:
            parts.insert(0, self._pools[layer])
        if sum(part.shape[1] for part in parts) <= self.compression.budget:
            return
        rows = torch.cat(parts, dim=1).to(query.device)
        self._pools[layer] = self._stored(gather(rows, self.compression.select(query, rows[..., : query.shape[-1]])))
        self._pooled[layer] = chunk + 1
        for c in clean:
            del self._slots[layer, c]

    def drop_before(self, chunk: int) -> None:
        """Free the slots of all chunks before `chunk`. A pool stays: its budget bounds it."""
        for key in [key for key in self._slots if key[1] < chunk]:
            del self._slots[key]

    def _stored(self, key_value: Tensor) -> Tensor:
        if self.storage is None or self.storage == key_value.device:
            return key_value
        # Pinned memory makes the copies back to a GPU several times as fast.
        pin = self.storage.type == "cpu" and key_value.is_cuda
        return torch.empty_like(key_value, device=self.storage, pin_memory=pin).copy_(key_value)

    @property
    def chunks(self) -> set[int]:
        """Chunks that hold keys and values of their own."""
        return {chunk for _, chunk in self._slots}

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self._slots.values(), *self._pools.values()))


@dataclass(frozen=True)
class ExtendedKeys:
    """A chunk's keys and values of which a forward computes some or all, and a line gives the others.

    Attributes:
        line: of this pass.
        chunk: index of the chunk.
        time: time variable of the line.
        rows: `[tokens]` indices that the forward runs, None for all.
    """

    line: KeyValueLine
    chunk: int
    time: float
    rows: Tensor | None

    def update(self, layer: int, key_value: Tensor, query: Tensor) -> Tensor:
        """Take in `[batch, count, kv heads, 2 * head dim]` and return those of all the chunk's tokens."""
        return self.line.complete(layer, self.chunk, (key_value,), self.time, self.rows)[0]


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
        final: whether the keys that this forward writes are those that stay.
        extended: extends the keys of the chunk's other tokens when some are run; None leaves them.
    """

    own: ChunkKVCache
    history: ChunkKVCache
    chunk: int
    start: int
    own_from: int
    rows: Tensor | None = None
    final: bool = False
    extended: ExtendedKeys | None = None

    def update(self, layer: int, key_value: Tensor, query: Tensor) -> Tensor:
        """Store `[batch, tokens, kv heads, 2 * head dim]`, return the rows of the whole range.

        The rows are read before `query` decides which clean ones are kept for later forwards.
        """
        if self.extended is None:
            self.own.write(layer, self.chunk, key_value, self.rows)
        else:
            self.own.write(layer, self.chunk, self.extended.update(layer, key_value, query))
        parts = [part for cache, start, end in self._ranges for part in cache.read(layer, start, end)]
        seen = [part.to(key_value.device) for part in parts]
        rows = seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)
        if self.final:
            self.own.compress(layer, self.chunk, query)
        return rows

    def length(self, chunk_tokens: int) -> int:
        """Keys that each query attends to, for chunks of `chunk_tokens`."""
        return sum(cache.length(start, end, chunk_tokens) for cache, start, end in self._ranges)

    @property
    def _ranges(self) -> list[tuple[ChunkKVCache, int, int]]:
        """Where the attended chunks are read from: cache, first chunk, end."""
        if self.own is self.history:
            return [(self.own, self.start, self.chunk + 1)]
        border = min(max(self.own_from, self.start), self.chunk)
        before = [(self.history, self.start, border)] if border > self.start else []
        return [*before, (self.own, border, self.chunk + 1)]


class OwnKeysOnly:
    """For a chunk that attends to nothing but itself and leaves no trace."""

    def update(self, layer: int, key_value: Tensor, query: Tensor) -> Tensor:
        """Return the keys and values that were given."""
        return key_value

    def length(self, chunk_tokens: int) -> int:
        """Keys that each query attends to, for chunks of `chunk_tokens`."""
        return chunk_tokens
