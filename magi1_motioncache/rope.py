"""Rotary positions over time, rows and columns with one learnable set of frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.errors import UserError

BASE = 10_000.0
REFERENCE_PATCHES = 16 * 16  # grid area whose spatial positions are used as they are


class RotaryPositions(nn.Module):
    """Table of sines and cosines for the tokens of one chunk.

    The three axes share the frequencies `bands`. Time is the absolute latent frame. Rows and columns are centred on the
    frame's middle and rescaled so that every resolution covers about the extent of a 16x16 grid. Only the first
    `6 * bands` channels of a head are rotated; the rest carry no position.

    Args:
        head_dim: channels of one attention head, a multiple of 8.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        count = head_dim // 8
        self.bands = nn.Parameter(BASE ** (-torch.arange(count, dtype=torch.float32) / count))

    def forward(self, first_frame: int, frames: int, rows: int, columns: int) -> Tensor:
        """Angles of every token of `frames` latent frames that start at the absolute latent frame `first_frame`.

        Args:
            first_frame: index of the first latent frame in the video.
            frames, rows, columns: size of the patch grid.

        Returns:
            `[tokens, 6 * bands]` fp32, sines then cosines, tokens ordered frame, row, column.

        Raises:
            UserError: a side of one patch whose rescaled size is not one.
        """
        device = self.bands.device
        scale = math.sqrt(rows * columns / REFERENCE_PATCHES)
        axes = (
            torch.arange(first_frame, first_frame + frames, dtype=torch.float32, device=device),
            _centred(rows, scale, device),
            _centred(columns, scale, device),
        )
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        angles = (grid.unsqueeze(-1) * self.bands.float()).flatten(-2).flatten(0, 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _centred(count: int, scale: float, device: torch.device) -> Tensor:
    positions = torch.arange(count, dtype=torch.float32, device=device) - (count - 1) / 2
    if count > 1:
        return positions / (count - 1) * (count / scale - 1)
    if count != scale:
        raise UserError(f"a side of {count} patch has no rotary scale; use at least 32 pixels on both sides")
    return positions


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel `c` together with channel `c + 3 * bands` by the token's angle; channels past `6 * bands` stay.

    Args:
        x: `[batch, tokens, heads, head dim]`, fp32.
        table: `[tokens, 6 * bands]` from `RotaryPositions`, rows of the same tokens.

    Returns:
        Same shape as `x`.
    """
    sin, cos = table.unsqueeze(1).chunk(2, dim=-1)
    half = sin.shape[-1]
    first, second, still = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], dim=-1)
