"""K/V of a chunk's reused tokens, followed along the line that their residual follows."""

from __future__ import annotations

import torch
from torch import Tensor

from common.cache.residual import ReuseBuffer


class KeyValueLine:
    """Fills up the K/V of a selected step to those of the whole chunk, for one guidance pass.

    Selected tokens attend to all tokens of their chunk, and the K/V of the others are as old as their last computation.
    Each token's K/V are measured whenever it is computed, and in between extended as its residual is, at no cost in
    matrix products and two more K/V of every chunk in the making.

    Args:
        order, weight, storage: as for `ReuseBuffer`.
    """

    def __init__(self, order: int, weight: float, storage: torch.device | None) -> None:
        self.order, self.weight, self.storage = order, weight, storage
        self._buffers: dict[int, dict[tuple[int, int], ReuseBuffer]] = {}

    def complete(
        self, layer: int, chunk: int, rows: tuple[Tensor, ...], time: float, tokens: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Take in what was computed and return the whole chunk's.

        Args:
            layer: which attention layer.
            chunk: which chunk, under any number that is its own.
            rows: `[batch, count, heads, width]` tensors such as K and V, of the chunk's tokens or those in `tokens`.
            time: time variable of the step, as for the residual.
            tokens: `[count]` indices inside the chunk, or None for all of them.

        Returns:
            As many tensors `[batch, tokens, heads, width]`.

        Raises:
            RuntimeError: a chunk's first call names tokens.
        """
        buffers = self._buffers.setdefault(chunk, {})
        whole = []
        for part, new in enumerate(rows):
            if (layer, part) not in buffers:
                buffers[layer, part] = ReuseBuffer(self.order, self.storage, weight=self.weight)
            buffer = buffers[layer, part]
            buffer.store(new.flatten(2), time, tokens)
            whole.append(new if tokens is None else buffer.predict(time, new.device).unflatten(2, new.shape[2:]))
        return tuple(whole)

    def release(self, chunk: int) -> None:
        """Forget a chunk: its K/V are final."""
        self._buffers.pop(chunk, None)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(buffer.bytes for buffers in self._buffers.values() for buffer in buffers.values())
