"""What a chunk's forward attends to: its own pass's keys and values, and before them those that were kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from common.cache.kv import KVCache, LayerKV, Write


class LayerStore(Protocol):
    """Where a layer of a chunk's forward puts its keys and values and learns what it may attend to."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take `[batch, new tokens, kv heads, head dim]` each and return all rows to attend to."""
        ...

    def attended(self, query: Tensor) -> None:
        """The rows are no longer needed; `query` `[batch, new tokens, query heads, head dim]` attended to them."""
        ...


class KeyValueStore(Protocol):
    """The stores of a forward's layers."""

    def layers(self, hidden: Tensor) -> Iterator[LayerStore]:
        """One for each layer, in order; each is good until the next is asked for.

        Args:
            hidden: `[batch, tokens, hidden]`, what enters the first.
        """
        ...


@dataclass(frozen=True)
class LayerView:
    """One layer of a `ChunkView` (see `LayerStore`).

    Attributes:
        own: of the forward's pass.
        write: where the chunk's new rows go.
        older: K and V of earlier chunks that another pass keeps, `[batch, rows, kv heads, head dim]`; None without any.
        compress: whether the keys that this forward writes are final and to be compressed.
    """

    own: LayerKV
    write: Write
    older: tuple[Tensor, Tensor] | None
    compress: bool

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.own.update(key, value, self.write)
        if self.older is None:
            return seen
        keys, values = (torch.cat(rows, dim=1) for rows in zip(self.older, seen, strict=True))
        return keys, values

    def attended(self, query: Tensor) -> None:
        if self.compress:
            self.own.compress(query, self.write)


@dataclass(frozen=True)
class ChunkView:
    """What one chunk's forward sees: it writes its own rows and attends to a range of chunks that ends with itself.

    Attributes:
        own: cache of this pass.
        write: the chunk, and from where on it attends to rows of this pass.
        history: cache of the pass that keeps earlier chunks, where that is another one; None elsewhere.
        seen_from: first token attended to; those before `write.seen_from` are read from `history`.
        final: whether the keys that this forward writes are those that stay.
    """

    own: KVCache
    write: Write
    history: KVCache | None = None
    seen_from: int = 0
    final: bool = False

    def layers(self, hidden: Tensor) -> Iterator[LayerView]:
        """See `KeyValueStore`."""
        opened, compress = self.own.open(self.write, hidden), self.final and self.own.compression is not None
        if not self._older:
            for own in opened:
                yield LayerView(own, self.write, None, compress)
            return
        for own, older in zip(opened, self.history.look(*self._older), strict=True):
            yield LayerView(own, self.write, older.read(*self._older), compress)

    def length(self) -> int:
        """Keys that each query attends to."""
        older = self.history.length(self._older[1], self._older[0]) if self._older else 0
        return older + self.own.length(self.write.end, self.write.seen_from)

    @property
    def _older(self) -> tuple[int, int] | None:
        if self.history is None or self.seen_from >= self.write.seen_from:
            return None
        return self.seen_from, self.write.seen_from


class OwnKeysOnly:
    """For a chunk that attends to nothing but itself and leaves no trace (see `KeyValueStore` and `LayerStore`)."""

    def layers(self, hidden: Tensor) -> Iterator[OwnKeysOnly]:
        return repeat(self)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that were given."""
        return key, value

    def attended(self, query: Tensor) -> None:
        """Nothing to do."""
