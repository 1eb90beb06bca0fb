"""Cut a video into overlapping tiles, run each, and blend the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError

TIME_AXIS = 2  # tiles are [batch, channels, frames, rows, columns]


@dataclass(frozen=True)
class Tiling:
    """Size and overlap of tiles, in pixels and frames.

    Attributes:
        length, height, width: size of a tile.
        temporal_overlap, spatial_overlap: share of a tile that the next one covers again.
    """

    length: int = 12
    height: int = 256
    width: int = 256
    temporal_overlap: float = 0.0
    spatial_overlap: float = 0.25

    def axes(self, unit: tuple[int, int, int]) -> list[Axis]:
        """Tiles counted in latents rather than pixels, when `unit` is pixels per latent; `(1, 1, 1)` leaves them.

        Raises:
            UserError: a tile smaller than one latent.
        """
        overlaps = (self.temporal_overlap, self.spatial_overlap, self.spatial_overlap)
        sizes = [size // per for size, per in zip((self.length, self.height, self.width), unit, strict=True)]
        if min(sizes) < 1:
            raise UserError(f"a tile of {self.length} frames, {self.height}x{self.width} is smaller than one latent")
        return [Axis(size, overlap) for size, overlap in zip(sizes, overlaps, strict=True)]


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis: each is `size` long and `overlap` of it is shared with the next."""

    size: int
    overlap: float

    @property
    def stride(self) -> int:
        """Distance between the beginnings of two tiles."""
        return int(self.size * (1 - self.overlap))

    @property
    def blend(self) -> int:
        """Length over which two tiles are blended."""
        return int(self.size * self.overlap)

    def starts(self, extent: int) -> range:
        """Where tiles begin in `extent`; the last may be shorter, and a tile may lie wholly inside the one before."""
        return range(0, extent, self.stride)


def run_tiled(
    x: Tensor, run: Callable[[Tensor], Tensor], source: list[Axis], target: list[Axis], chained: bool
) -> Tensor:
    """Run tile by tile and blend linearly, over time first, then rows, then columns.

    Args:
        x: `[batch, channels, frames, rows, columns]`.
        run: one tile -> its result.
        source, target: tiles along the three axes, measured in `x` and in the result.
        chained: blend with neighbours that were blended themselves; else with the neighbours as they came.

    Returns:
        The result of the whole.
    """
    starts = [axis.starts(extent) for axis, extent in zip(source, x.shape[2:], strict=True)]
    tiles = {}
    for place in itertools.product(*(range(len(s)) for s in starts)):
        corner = [s[i] for s, i in zip(starts, place, strict=True)]
        cut = [slice(begin, begin + axis.size) for begin, axis in zip(corner, source, strict=True)]
        tiles[place] = run(x[(..., *cut)])
    blended = {}
    neighbours = blended if chained else tiles
    for place, tile in tiles.items():
        for number, axis in enumerate(target):
            if place[number]:
                before = (*place[:number], place[number] - 1, *place[number + 1 :])
                tile = _blend(neighbours[before], tile, axis.blend, TIME_AXIS + number)
        blended[place] = tile
    kept = [slice(axis.size - axis.blend) for axis in target]
    return _join({place: tile[(..., *kept)] for place, tile in blended.items()}, [len(s) for s in starts])


def _blend(before: Tensor, tile: Tensor, extent: int, axis: int) -> Tensor:
    extent = min(before.shape[axis], tile.shape[axis], extent)
    shape = [1] * tile.ndim
    shape[axis] = extent
    weight = (torch.arange(extent, device=tile.device, dtype=torch.float32) / max(extent, 1)).view(shape).to(tile.dtype)
    tail = before.narrow(axis, before.shape[axis] - extent, extent)
    head, rest = tile.split([extent, tile.shape[axis] - extent], dim=axis)
    return torch.cat([tail * (1 - weight) + head * weight, rest], dim=axis)


def _join(tiles: dict[tuple[int, ...], Tensor], counts: list[int]) -> Tensor:
    frames, rows, columns = (range(count) for count in counts)
    slabs = [
        torch.cat([torch.cat([tiles[f, r, c] for c in columns], dim=TIME_AXIS + 2) for r in rows], dim=TIME_AXIS + 1)
        for f in frames
    ]
    return torch.cat(slabs, dim=TIME_AXIS)
