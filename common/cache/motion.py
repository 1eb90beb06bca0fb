"""Motion maps and weights: which tokens of a chunk move (MotionCache Eq. 9 and 10)."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-8


def motion_map(features: Tensor, grid: tuple[int, int, int], previous_frame: Tensor | None, relative: bool) -> Tensor:
    """Inter-frame difference per token (Eq. 9).

    The first frame is compared with the last frame of the chunk before; without one it copies the second frame's map.

    Args:
        features: `[batch, tokens, channels]`, tokens ordered frame, row, column.
        grid: frames, rows and columns of the chunk.
        previous_frame: `[batch, rows*columns, channels]`, the last frame of the chunk before, or None.
        relative: divide by the mean magnitude of the earlier frame (SkyReels' public code) or not (MAGI-1's).

    Returns:
        `[frames, rows*columns]` float32: mean |difference| over channels and batch.
    """
    frames, rows, columns = grid
    x = features.float().unflatten(1, (frames, rows * columns))
    earlier = x[:, :-1]
    if previous_frame is not None:
        earlier = torch.cat([previous_frame.to(x).unsqueeze(1), earlier], dim=1)
    later = x[:, frames - earlier.shape[1] :]
    difference = (later - earlier).abs().mean(dim=(0, 3))
    if relative:
        difference = difference / (earlier.abs().mean(dim=(0, 3)) + _EPS)
    if previous_frame is not None:
        return difference
    if frames == 1:  # nothing to compare with: no token is known to move more than another
        return torch.zeros(1, rows * columns, device=x.device)
    return torch.cat([difference[:1], difference])


def motion_weights(scores: Tensor, alpha: float) -> Tensor:
    """Update frequency per token, `W = α + (1-α)·norm(scores)`, min-max normalised per frame (Eq. 10).

    Args:
        scores: `[frames, tokens per frame]`, any non-negative measure of change.
        alpha: smallest weight, 0 to 1.

    Returns:
        `[frames * tokens per frame]` float32 in `[alpha, 1]`.
    """
    low = scores.amin(dim=1, keepdim=True)
    high = scores.amax(dim=1, keepdim=True)
    normalised = (scores - low) / (high - low + _EPS)
    return (alpha + (1.0 - alpha) * normalised).flatten()
