"""Keys and values of a window, per layer: whole write, selected write, compression, freeze."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.cache.compression import Compression, gather
from common.cache.kv_line import KeyValueLine


@dataclass(frozen=True)
class Write:
    """Where the tokens of one call go in the cache.

    Attributes:
        start: first token of the chunk in the window.
        length: tokens of the chunk.
        tokens: `[count]` indices inside the chunk, or None for all of them.
        time: time variable of the step, for a cache with a `line`; None if the rows are final.
    """

    start: int
    length: int
    tokens: Tensor | None = None
    time: float | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(eq=False)
class LayerKV:
    """K and V of one attention layer of a `KVCache`, whose settings it shares.

    It is all that a block touches of the cache: what differs between layers reaches a compiled block as an argument, so
    one graph serves them all.

    Attributes:
        layer: which attention layer.
        tokens, storage, compression, line: as for `KVCache`.
        keys, values: `[batch, rows, heads, head dim]`, None before the first write.
        removed: rows taken out so far, all of them before any row that is still written to.
    """

    layer: int
    tokens: int
    storage: torch.device | None
    compression: Compression | None
    line: KeyValueLine | None
    keys: Tensor | None = None
    values: Tensor | None = None
    removed: int = 0

    def update(self, key: Tensor, value: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`, for a write that `KVCache.open` has let pass."""
        tokens = write.tokens
        if self.line is not None and write.time is not None:
            key, value = self.line.complete(self.layer, write.start, (key, value), write.time, tokens)
            tokens = None
        start, end = write.start - self.removed, write.end - self.removed
        self.keys, self.values = self._with_room(self.keys, end, key), self._with_room(self.values, end, value)
        for store, new in ((self.keys, key), (self.values, value)):
            rows = store[:, start:end]
            if tokens is None:
                rows.copy_(new)
            else:
                rows.index_copy_(1, tokens.to(store.device), new.to(store.device))
        return self.keys[:, :end].to(key.device), self.values[:, :end].to(key.device)

    def compress(self, query: Tensor, write: Write) -> None:
        """As `KVCache.compress`."""
        end = write.end - self.removed
        if self.compression is None or end <= self.compression.budget:
            return
        kept = self.compression.select(query, self.keys[:, :end].to(query.device))
        for store in (self.keys, self.values):
            moved = torch.cat([gather(store[:, :end], kept), store[:, end:]], dim=1)
            store[:, : moved.shape[1]] = moved
        self.removed += end - self.compression.budget

    def _with_room(self, store: Tensor | None, rows: int, like: Tensor) -> Tensor:
        """The store itself if it has that many rows, else a larger one with its content."""
        if store is not None and store.shape[1] >= rows:
            return store
        larger = self._allocate(rows if self.compression else self.tokens, like)
        if store is not None:
            larger[:, : store.shape[1]] = store
        return larger

    def _allocate(self, rows: int, like: Tensor) -> Tensor:
        batch, _, heads, width = like.shape
        if self.storage is None or self.storage == like.device:
            # A head's rows side by side in memory: attention reads them in runs, the more so the fewer its queries.
            return torch.zeros(batch, heads, rows, width, dtype=like.dtype, device=like.device).transpose(1, 2)
        # Rows that travel are side by side instead, and pinned memory lets the copies to a GPU run beside its work.
        pin = self.storage.type == "cpu" and like.device.type == "cuda"
        return torch.zeros(batch, rows, heads, width, dtype=like.dtype, device=self.storage, pin_memory=pin)


class KVCache:
    """K and V of one branch of one window, `[batch, rows, heads, head dim]` per layer.

    Rows are the window's tokens in order. With compression, those of clean chunks beyond the budget are taken out and
    the rows behind them move up, so that what a chunk attends to is always one piece of memory from row 0 on.

    Args:
        layers: number of attention layers.
        tokens: tokens of the whole window.
        storage: device that holds the tensors; None takes that of the first write. On another device than the
            model's, only the rows asked for travel.
        compression: what bounds the clean chunks' K/V. Without it the whole window is allocated at the first write,
            with it rows are added as chunks begin.
        line: extends the K/V of a chunk's other tokens when some are written.
    """

    def __init__(
        self,
        layers: int,
        tokens: int,
        storage: torch.device | None = None,
        compression: Compression | None = None,
        line: KeyValueLine | None = None,
    ) -> None:
        self.tokens = tokens
        self.compression = compression
        self.line = line
        self._layers = [LayerKV(layer, tokens, storage, compression, line) for layer in range(layers)]
        self._frozen: set[int] = set()

    def freeze(self, start: int) -> None:
        """The chunk that starts at token `start` is final: a later write there is a defect and raises."""
        self._frozen.add(start)
        if self.line is not None:
            self.line.release(start)

    def length(self, end: int) -> int:
        """Keys that a chunk attends to which ends at token `end` of the window."""
        return end - self._layers[0].removed

    def open(self, write: Write) -> list[LayerKV]:
        """The layers, for a write that is allowed.

        Raises:
            RuntimeError: the rows are frozen, or outside the window.
        """
        if write.start in self._frozen:
            raise RuntimeError(f"the K/V of the chunk at row {write.start} are final")
        if write.end > self.tokens:
            raise RuntimeError(f"K/V write up to row {write.end} in a window of {self.tokens}")
        return self._layers

    def update(self, layer: int, key: Tensor, value: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """Write a call's K/V and return everything that its queries may attend to.

        Args:
            layer: which attention layer.
            key, value: `[batch, count, heads, head dim]`, of the chunk's tokens or of those in `write.tokens`.
            write: where they go.

        Returns:
            K and V up to the chunk's end, `[batch, length(write.end), heads, head dim]`, on the device of `key`.

        Raises:
            RuntimeError: the rows are frozen, or outside the window.
        """
        return self.open(write)[layer].update(key, value, write)

    def compress(self, layer: int, query: Tensor, write: Write) -> None:
        """Cut the clean rows of a layer down to the budget, if they exceed it.

        Args:
            layer: which attention layer.
            query: `[batch, tokens, query heads, head dim]` of the chunk that has just become clean.
            write: that chunk's last write. All rows up to its end must be final.
        """
        self._layers[layer].compress(query, write)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        held = [t for layer in self._layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.nbytes for t in held)
