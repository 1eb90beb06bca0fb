"""Times of the denoising steps, and which chunks are in the window at each stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magi1_motioncache.config import SHORTCUT_STEPS

SHIFT = 3.0
QUARTERS = 4


def timesteps(num_steps: int, shortcut_mode: str = "8,16,16") -> Tensor:
    """Times from noise (0) to clean (1).

    Computed in fp32 on purpose: the value after three quarters is 0.30000001, which lies above the threshold 0.3 of the
    nearly clean copy, and in fp64 it would not.

    Args:
        num_steps: denoising steps; 12 has an uneven schedule.
        shortcut_mode: with 12 steps, which third of every quarter is the long step, first or last.

    Returns:
        `[num_steps + 1]` fp32.
    """
    if num_steps == SHORTCUT_STEPS:
        sixteenths = torch.linspace(0, 1, QUARTERS + 1) / QUARTERS
        offsets = sixteenths[:3] if shortcut_mode == "16,16,8" else torch.cat([sixteenths[:1], sixteenths[2:4]])
        quarters = torch.linspace(0, 1, QUARTERS + 1)
        even = (offsets + quarters.unsqueeze(-1)).flatten()[: num_steps + 1]
    else:
        even = torch.linspace(0, 1, num_steps + 1)
    return transformed(even)


def transformed(even: Tensor) -> Tensor:
    """Times in [0, 1] at even places in [0, 1] of a schedule: squared and shifted by 3."""
    squared = even**2
    return 1 / SHIFT * squared / (1 + (1 / SHIFT - 1) * squared)


def step_intervals(num_steps: int, shortcut_mode: str = "8,16,16") -> list[int]:
    """Relative length of every step, in groups of three; all ones when the steps do not divide by three."""
    if num_steps % 3:
        return [1] * num_steps
    return ([1, 1, 2] if shortcut_mode == "16,16,8" else [2, 1, 1]) * (num_steps // 3)


def step_size_input(num_steps: int, interval: int) -> float:
    """The number a distilled model gets for its step size: the steps of an even schedule of such steps, halved."""
    return 8 / interval if num_steps == SHORTCUT_STEPS else num_steps / 2


@dataclass(frozen=True)
class Stage:
    """What the window holds between two of its moves.

    Attributes:
        chunk_start, chunk_end: chunks denoised, end excluded.
        level_start, level_end: how many stages those chunks have behind them; the oldest chunk has the most,
            `level_end - 1`.
    """

    chunk_start: int
    chunk_end: int
    level_start: int
    level_end: int

    def level(self, chunk: int) -> int:
        """Stages that `chunk` has behind it."""
        return self.level_end - 1 - (chunk - self.chunk_start)


def stages(num_chunks: int, window: int, offset: int = 0) -> list[Stage]:
    """The stages of a whole video.

    Args:
        num_chunks: chunks of the video, prefix included.
        window: chunks denoised at the same time at most.
        offset: whole chunks given as prefix.
    """
    return [
        Stage(
            chunk_start=max(offset, last - window + 1),
            chunk_end=min(num_chunks, last + 1),
            level_start=max(0, last - num_chunks + 1),
            level_end=min(window, last - offset + 1),
        )
        for last in range(offset, num_chunks + window - 1)
    ]
