"""From accumulated change to the tokens that a step computes (MotionCache Eq. 12 and 13, and what its code adds)."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_vote(wanted: Tensor, frames: int) -> Tensor:
    """Per spatial position, all frames of the chunk if more than half of them want it, else none.

    Args:
        wanted: `[tokens]` bool, ordered frame, row, column.
        frames: frames in the chunk.

    Returns:
        `[tokens]` bool.
    """
    per_position = wanted.view(frames, -1).float().mean(dim=0) > 0.5
    return per_position.repeat(frames)


def bucketed(count: int, bucket: int, total: int) -> int:
    """`count` rounded up to a multiple of `bucket`, at most `total`."""
    return min(-(-count // bucket) * bucket, total)


def most_urgent(urgency: Tensor, count: int, wanted: Tensor | None = None) -> Tensor:
    """Indices of the `count` most urgent tokens in ascending order; wanted ones come before all others.

    Args:
        urgency: `[tokens]` accumulated change.
        count: how many; at least the number of wanted tokens.
        wanted: `[tokens]` bool, or None.

    Returns:
        `[count]` int64. Ascending, so that gathered rows keep their order in memory.
    """
    if wanted is not None:
        urgency = urgency + wanted * (urgency.abs().amax() * 2 + 1)
    return torch.topk(urgency, count, sorted=False).indices.sort().values


def nearest_computed(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """For every token of a chunk, which of the computed ones is nearest (same frame preferred, then space).

    Args:
        tokens: `[count]` indices of the computed tokens.
        grid: frames, rows and columns.

    Returns:
        `[tokens]` int64, positions in `tokens`.
    """
    frames, rows, columns = grid
    index = torch.arange(frames * rows * columns, device=tokens.device)

    def position(i: Tensor) -> Tensor:
        # A frame apart counts as four rows: content moves little from frame to frame, but phases of rotary keys do.
        return torch.stack([4 * (i // (rows * columns)), i // columns % rows, i % columns], dim=1).float()

    return torch.cdist(position(index), position(tokens)).argmin(dim=1)
