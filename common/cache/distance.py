"""How far a chunk moved since its previous step: Δ of Eq. 12."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """Mean |current - previous| over mean |previous|, as a float32 scalar tensor on the same device."""
    return joint_relative_l1([(current, previous)])


def joint_relative_l1(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`relative_l1` of several chunks as if they were one; each pair is a chunk's current and previous signal."""
    moved = sum((current.float() - previous.float()).abs().mean() for current, previous in pairs)
    size = sum(previous.float().abs().mean() for _, previous in pairs)
    return moved / (size + 1e-8)


def rescale(value: Tensor, polynomial: tuple[float, ...]) -> Tensor:
    """TeaCache's polynomial (highest power first) by Horner's rule."""
    result = torch.zeros_like(value)
    for coefficient in polynomial:
        result = result * value + coefficient
    return result


def table_entry(table: tuple[float, ...], step: int, num_steps: int) -> float:
    """Δ measured beforehand for a step.

    Args:
        table: Δ per step; a table of another length than `num_steps` is resampled along its running sum, so that a run
            of fewer, longer steps passes through the same total change.
        step: from 0; nothing comes before step 0, its Δ is 0.
        num_steps: steps of this run.
    """
    if step == 0:
        return 0.0
    if len(table) == num_steps:
        return table[step]
    path = np.cumsum(table)
    before, now = (k * (len(table) - 1) / (num_steps - 1) for k in (step - 1, step))
    return float(np.diff(np.interp([before, now], np.arange(len(table)), path))[0])


def log_snr(sigma: float) -> float:
    """λ = log((1-σ)/σ) of the flow-matching path x = (1-σ)·clean + σ·noise, clamped away from its poles."""
    sigma = min(max(sigma, 1e-4), 1 - 1e-4)
    return math.log((1 - sigma) / sigma)
