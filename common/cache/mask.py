"""From accumulated change to the tokens that a step computes (MotionCache Eq. 12 and 13, and what its code adds)."""

from __future__ import annotations

import torch
from torch import Tensor

GRADED_CHUNKS = 4
"""Chunks over which a grading rises; in the published settings four or five are denoised at the same time."""


def graded(grading: float, place: int) -> float:
    """Factor on a chunk's threshold: 1 - grading for the first chunk, 1 + grading from the fourth on, evenly between.

    The mean over the first four chunks is 1.

    Args:
        grading: 0 to below 1.
        place: of the chunk among those that are denoised, from 0.
    """
    last = GRADED_CHUNKS - 1
    return 1.0 + grading * (2.0 * min(place, last) / last - 1.0)


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
