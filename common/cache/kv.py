"""Keys and values of a guidance pass, per layer: whole write, selected write, compression, freeze."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.cache.compression import Compression, gather
from common.cache.eight_bit import STEP_BYTES, pack, unpack
from common.cache.staging import Staging


@dataclass(frozen=True)
class Write:
    """Where the tokens of one call go in the cache, and what they attend to.

    Attributes:
        start: first token of the chunk in the video or window.
        length: tokens of the chunk.
        tokens: `[count]` indices inside the chunk, or None for all of them.
        seen_from: first token attended to; the last is the chunk's own.
    """

    start: int
    length: int
    tokens: Tensor | None = None
    seen_from: int = 0

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
        compression: as for `KVCache`.
        keys, values: `[batch, rows, heads, head dim]` on the model's device; None until `KVCache.open` makes room, and
            between calls where K/V wait in main memory.
        unpacked: dtype in which K and V are given and read, where they are kept packed (see `eight_bit`); None where
            they are kept as they are given.
        removed: rows taken out so far, all of them before any row that is still written to.
        seen: the parts of `keys` and `values` that the running call attends to; its own chunk is at their end.
        waiting: by a chunk's first token, K and V in main memory, `[2, batch, tokens, heads, head dim]`, see `Staging`.
    """

    layer: int
    compression: Compression | None
    keys: Tensor | None = None
    values: Tensor | None = None
    unpacked: torch.dtype | None = None
    removed: int = 0
    seen: tuple[Tensor, Tensor] | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)

    def update(self, key: Tensor, value: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """Write a call's K/V and return everything that its queries may attend to.

        Args:
            key, value: `[batch, count, heads, head dim]`, of the chunk's tokens or of those in `write.tokens`.
            write: where they go, for which `KVCache.open` was called.

        Returns:
            K and V from `write.seen_from` to the chunk's end, `[batch, rows, heads, head dim]`: parts of the cache,
            which the next write changes, or what they are unpacked to.
        """
        tokens = write.tokens
        given = (key, value) if self.unpacked is None else pack(torch.stack((key, value)))
        for seen, new in zip(self.seen, given, strict=True):
            # Counted from the end: a compiled block has no place in the video built in.
            rows = seen[:, -write.length :]
            if tokens is None:
                rows.copy_(new)
            elif torch.compiler.is_compiling():  # PyTorch's compiler would copy all rows for the other form
                seen[:, tokens + (seen.shape[1] - write.length)] = new
            else:
                rows.index_copy_(1, tokens, new)
        keys, values = self.seen
        return self._as_given(keys), self._as_given(values)

    def see(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The rows of the tokens from `start` to `end`, as far as they are there and as they are kept: views.

        Where rows were taken out, what is left of them stands for the latest.
        """
        first, last = max(0, start - self.removed), end - self.removed
        return _rows(self.keys, first, last), _rows(self.values, first, last)

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V of the rows that `see` gives, as `update` returns them."""
        keys, values = self.see(start, end)
        return self._as_given(keys), self._as_given(values)

    def _as_given(self, rows: Tensor) -> Tensor:
        return rows if self.unpacked is None else unpack(rows, self.unpacked)

    def compress(self, query: Tensor, write: Write) -> None:
        """Cut the clean rows down to the budget, if they exceed it.

        Args:
            query: `[batch, tokens, query heads, head dim]`, rotated, of the chunk that has just become clean.
            write: that chunk's last write. All rows up to its end must be final.
        """
        end = write.end - self.removed
        if self.compression is None or end <= self.compression.budget:
            return
        kept = self.compression.select(query, self._as_given(self.keys[:, :end]))
        for store in (self.keys, self.values):
            moved = torch.cat([gather(store[:, :end], kept), store[:, end:]], dim=1)
            store[:, : moved.shape[1]] = moved
        self.removed += end - self.compression.budget

    def drop_before(self, start: int) -> None:
        """Take out all rows before token `start`; the others move up."""
        rows = start - self.removed
        self.waiting = {chunk: parts for chunk, parts in self.waiting.items() if chunk >= start}
        if self.keys is not None and rows < self.keys.shape[1]:
            for store in (self.keys, self.values):
                store[:, :-rows] = store[:, rows:].clone()
        else:
            self.keys = self.values = None
        self.removed = start

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in (self.keys, self.values, *self.waiting.values()) if t is not None)

    def make_room(self, rows: int, heads: int, width: int, like: Tensor, by_head: bool) -> None:
        """Exchange K and V for larger ones, with what they hold, if they hold fewer rows.

        It is not for `update` to do: a block that is compiled meets nothing that happens once.

        Args:
            rows, heads, width: of K and V.
            like: `[batch, ...]` of their dtype and device.
            by_head: a head's rows side by side in memory, instead of a row's heads.
        """
        if self.keys is not None and self.keys.shape[1] >= rows:
            return
        before, batch = (self.keys, self.values), like.shape[0]
        if by_head:
            self.keys, self.values = (like.new_zeros(batch, heads, rows, width).transpose(1, 2) for _ in before)
        else:
            self.keys, self.values = (like.new_zeros(batch, rows, heads, width) for _ in before)
        if before[0] is not None:
            for larger, store in zip((self.keys, self.values), before, strict=True):
                larger[:, : store.shape[1]] = store


def _rows(store: Tensor, first: int, last: int) -> Tensor:
    """`store[:, first:last]`, as a compiled block wants it: one graph serves all numbers of rows."""
    # Strides that tell how much room there is would be taken notice of.
    rows = store[0, first:last].unsqueeze(0) if store.shape[0] == 1 else store[:, first:last]
    torch._dynamo.maybe_mark_dynamic(rows, 1)
    return rows


class KVCache:
    """K and V of one guidance pass, `[batch, rows, heads, head dim]` per layer.

    Rows are the tokens in order, from the first that was written. With compression, those of clean chunks beyond the
    budget are taken out and the rows behind them move up: what a chunk attends to is always one piece of memory.

    Args:
        layers: number of attention layers.
        heads: of K and V in each.
        width: channels of a head.
        rows: the most that are held at a time, for which room is made at the first write, unless K/V are compressed.
            None, and compression, add rows as chunks begin.
        compression: what bounds the clean chunks' K/V.
        staging: keeps K/V in main memory and brings each layer's to the model's device when it is due; None leaves them
            there.
        packed: whether rows are kept in 8 bits (see `eight_bit`).
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        rows: int | None = None,
        compression: Compression | None = None,
        staging: Staging | None = None,
        packed: bool = False,
    ) -> None:
        self.rows = rows
        self.compression = compression
        self._staging = staging
        self._layers = [LayerKV(layer, compression) for layer in range(layers)]
        self._shape = heads, width + STEP_BYTES if packed else width
        self._packed = packed
        self._frozen: set[int] = set()
        self._whole: set[int] = set()  # first tokens of the chunks that were written and not dropped
        self._first = 0  # token of the first row, until compression takes rows out

    def freeze(self, start: int) -> None:
        """The chunk that starts at token `start` is final: a later write there is a defect and raises."""
        self._frozen.add(start)

    def length(self, end: int, seen_from: int = 0) -> int:
        """Keys from token `seen_from` to token `end`."""
        removed = self._layers[0].removed if self._whole else seen_from
        return end - removed - max(0, seen_from - removed)

    def open(self, write: Write, like: Tensor) -> Iterator[LayerKV]:
        """The layers one after another, each with its K/V on the model's device until the next is asked for.

        Args:
            write: what the layers are opened for.
            like: `[batch, ...]` of the dtype and device of K and V.

        Raises:
            RuntimeError: the rows are final, more than there is room for, or a selection of a chunk that was never
                written whole.
        """
        if write.start in self._frozen:
            raise RuntimeError(f"the K/V of the chunk at row {write.start} are final")
        if write.tokens is not None and write.start not in self._whole:
            raise RuntimeError(f"the K/V of the chunk at row {write.start} were never written whole")
        if not self._whole:
            self._first = write.start
            for layer in self._layers:
                layer.removed = write.start
        rows = write.end - self._layers[0].removed
        # Made once, room leaves no pieces behind, and attention reads a head's rows in runs: the more so the fewer its
        # queries.
        at_once = self.compression is None and self.rows is not None
        if at_once and rows > self.rows:
            raise RuntimeError(f"{rows} rows of K/V where there is room for {self.rows}")
        self._whole.add(write.start)
        rows = self.rows if at_once else rows
        if self._packed:
            for layer in self._layers:
                layer.unpacked = like.dtype
            like = like.new_empty(like.shape[0], 0, dtype=torch.int8)
        if self._staging is None:
            for layer in self._layers:
                layer.make_room(rows, *self._shape, like, by_head=at_once)
            return self._opened(self._layers, write)
        self._staging.make_room(rows, *self._shape, like)
        # Compression scores everything; a whole write replaces what is there of its own chunk.
        first = 0 if self.compression is not None else write.seen_from
        last = write.start if write.tokens is None else write.end
        staged = self._staging.through(self._layers, (first, last), (write.start, write.end))
        return self._opened(staged, write)

    def _opened(self, layers: Iterable[LayerKV], write: Write) -> Iterator[LayerKV]:
        for layer in layers:
            layer.seen = layer.see(write.seen_from, write.end)
            yield layer
            layer.seen = None

    def look(self, start: int, end: int) -> Iterator[LayerKV]:
        """The layers one after another as `open` gives them, to `read` the tokens from `start` to `end`."""
        return iter(self._layers) if self._staging is None else self._staging.through(self._layers, (start, end))

    def drop_before(self, start: int) -> None:
        """Free the rows of all tokens before token `start`. What compression has kept stays: its budget bounds it."""
        compressed = self._layers[0].removed > self._first
        if compressed or not self._whole or start <= self._first:
            return
        for layer in self._layers:
            layer.drop_before(start)
        self._first = start
        for chunk in [chunk for chunk in self._whole if chunk < start]:
            self._whole.remove(chunk)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.bytes for layer in self._layers)
