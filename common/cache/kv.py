"""Keys and values of a window, per layer: whole write, selected write, freeze."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.cache.mask import nearest_computed


@dataclass(frozen=True)
class Write:
    """Where the tokens of one call go in the cache.

    Attributes:
        start: first token of the chunk in the window.
        length: tokens of the chunk.
        tokens: `[count]` indices inside the chunk, or None for all of them.
        nearest: `[length]` positions in `tokens` (see `nearest_computed`), when reused tokens follow their neighbours.
    """

    start: int
    length: int
    tokens: Tensor | None = None
    nearest: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.length

    @classmethod
    def of(cls, start: int, grid: tuple[int, int, int], tokens: Tensor | None, reused_kv: str) -> Write:
        """The write of a chunk that starts at token `start`, with `reused_kv` as in `MotionCacheConfig`."""
        frames, rows, columns = grid
        follow = reused_kv == "neighbour" and tokens is not None
        return cls(start, frames * rows * columns, tokens, nearest_computed(tokens, grid) if follow else None)


class KVCache:
    """K and V of one branch of one window.

    `[batch, window tokens, heads, head dim]` per layer, allocated on the first write.

    Args:
        layers: number of attention layers.
        tokens: tokens of the whole window.
        storage: device that holds the tensors; None takes that of the first write. On another device than the
            model's, only the rows asked for travel.
    """

    def __init__(self, layers: int, tokens: int, storage: torch.device | None = None) -> None:
        self.layers = layers
        self.tokens = tokens
        self.storage = storage
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._frozen: set[int] = set()

    def freeze(self, start: int) -> None:
        """The chunk that starts at row `start` is final: a later write there is a defect and raises."""
        self._frozen.add(start)

    def update(self, layer: int, key: Tensor, value: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """Write a call's K/V and return everything that its queries may attend to.

        Args:
            layer: which attention layer.
            key, value: `[batch, count, heads, head dim]`, of the chunk's tokens or of those in `write.tokens`.
            write: where they go.

        Returns:
            K and V of rows 0 to the chunk's end, `[batch, write.end, heads, head dim]`, on the device of `key`.

        Raises:
            RuntimeError: the rows are frozen, or outside the window.
        """
        if write.start in self._frozen:
            raise RuntimeError(f"the K/V of the chunk at row {write.start} are final")
        if write.end > self.tokens:
            raise RuntimeError(f"K/V write up to row {write.end} in a window of {self.tokens}")
        if self._keys[layer] is None:
            self._keys[layer] = self._allocate(key)
            self._values[layer] = self._allocate(value)
        for store, new in ((self._keys[layer], key), (self._values[layer], value)):
            rows = store[:, write.start : write.end]
            if write.tokens is None:
                rows.copy_(new)
                continue
            new, tokens = new.to(store.device), write.tokens.to(store.device)
            if write.nearest is not None:
                rows += (new - rows[:, tokens])[:, write.nearest.to(store.device)]
            rows[:, tokens] = new
        return tuple(store[:, : write.end].to(key.device) for store in (self._keys[layer], self._values[layer]))

    def _allocate(self, like: Tensor) -> Tensor:
        batch, _, heads, width = like.shape
        device = self.storage or like.device
        # Pinned memory lets the copies back to a GPU run beside its work.
        pin = device.type == "cpu" and like.device.type == "cuda"
        return torch.zeros(batch, self.tokens, heads, width, dtype=like.dtype, device=device, pin_memory=pin)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        held = [t for t in (*self._keys, *self._values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)
