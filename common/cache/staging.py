"""K/V that wait in main memory: a layer's are copied to the device while the layer before it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import UserError

if TYPE_CHECKING:
    from common.cache.kv import LayerKV

POOL = -1
"""Key of the rows that compression has kept, among chunks that are named by their first token."""


class Staging:
    """Two places on the device that the layers of a cache take in turns.

    On CUDA all copies run on a stream of their own, one after another, and neither they nor the model make the host
    wait: the next layer's K/V arrive while a layer computes, and what it wrote leaves while the next one does. Caches
    may share a staging as long as they are opened one at a time.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[tuple[Tensor, Tensor]] = []  # K and V `[batch, rows, heads, head dim]`
        self._arrived: list[torch.cuda.Event | None] = [None, None]

    def make_room(self, rows: int, heads: int, width: int, like: Tensor) -> None:
        """Hold at least `rows` rows of K and V, of the batch size and dtype of `like`, at each place."""
        if self._places and self._places[0][0].shape[1] >= rows:
            return
        if self._stream is not None:
            self._stream.synchronize()
        # Tensors of their own: a compiled block would take notice of where in a common one its rows begin.
        key, value = ([like.new_empty(like.shape[0], rows, heads, width) for _ in range(2)] for _ in range(2))
        self._places = list(zip(key, value, strict=True))

    def through(
        self, layers: Sequence[LayerKV], wanted: tuple[int, int], written: tuple[int, int] | None = None
    ) -> Iterator[LayerKV]:
        """The layers one after another, each with K/V on the device until the next is asked for.

        Args:
            layers: of one cache.
            wanted: first and last token of the rows to bring, end excluded.
            written: the same of the chunk that is written meanwhile and has to be kept; None only reads.
        """
        self._fetch(layers[0], 0, wanted)
        for number, layer in enumerate(layers):
            if number + 1 < len(layers):
                self._fetch(layers[number + 1], (number + 1) % 2, wanted)
            self._lend(layer, number % 2)
            removed = layer.removed
            yield layer
            if written is not None:
                self._keep(layer, *written, compressed=layer.removed > removed)
            layer.keys = layer.values = None

    def _fetch(self, layer: LayerKV, place: int, wanted: tuple[int, int]) -> None:
        first, last = max(0, wanted[0] - layer.removed), wanted[1] - layer.removed
        with self._copying():  # behind the layer that had the place before; the one that goes beside it comes later
            for start, waiting in layer.waiting.items():
                row = 0 if start == POOL else start - layer.removed
                begin, end = max(first, row), min(last, row + waiting.shape[2])
                if begin < end:
                    for there, here in zip(self._places[place], waiting, strict=True):  # K, V: one piece of memory each
                        there[:, begin:end].copy_(here[:, begin - row : end - row], non_blocking=True)
        if self._stream is not None:
            self._arrived[place] = self._stream.record_event()

    def _lend(self, layer: LayerKV, place: int) -> None:
        layer.keys, layer.values = self._places[place]
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[place])

    def _keep(self, layer: LayerKV, start: int, end: int, compressed: bool) -> None:
        if compressed:
            layer.waiting = {chunk: rows for chunk, rows in layer.waiting.items() if chunk >= end}
            start, key = layer.removed, POOL
        else:
            key = start
        first, last = start - layer.removed, end - layer.removed
        if key not in layer.waiting:
            batch, _, heads, width = layer.keys.shape
            shape, pinned = (2, batch, last - first, heads, width), self._stream is not None
            try:
                layer.waiting[key] = torch.empty(shape, dtype=layer.keys.dtype, pin_memory=pinned)
            except torch.AcceleratorError as error:
                advice = "use fewer pixels or frames, or state_device: model"
                raise UserError(f"main memory does not suffice for K/V ({error}); {advice}") from error
        with self._copying():
            for there, here in zip(layer.waiting[key], (layer.keys, layer.values), strict=True):
                there.copy_(here[:, first:last], non_blocking=True)

    def _copying(self) -> AbstractContextManager:
        """Inside, work goes to the stream of copies, behind all that the model was given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)
