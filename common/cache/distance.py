"""How far a chunk moved since its previous step: Δ of Eq. 12."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.errors import UserError


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """Mean |current - previous| over mean |previous|, as a float32 scalar tensor on the same device."""
    previous = previous.float()
    return (current.float() - previous).abs().mean() / (previous.abs().mean() + 1e-8)


def rescale(value: Tensor, polynomial: tuple[float, ...] | None) -> Tensor:
    """TeaCache's polynomial (highest power first) by Horner's rule; the value itself without one."""
    if polynomial is None:
        return value
    result = torch.zeros_like(value)
    for coefficient in polynomial:
        result = result * value + coefficient
    return result


def table_entry(table: tuple[float, ...], step: int, num_steps: int) -> float:
    """Δ measured beforehand for the step, entry `step` of `[num_steps]`.

    Raises:
        UserError: the table was measured with another number of steps.
    """
    if len(table) != num_steps:
        raise UserError(
            f"distance_table has {len(table)} entries but the run has {num_steps} steps; "
            f"use --steps {len(table)} or measure a table for {num_steps}"
        )
    return table[step]


def log_snr(sigma: float) -> float:
    """λ = log((1-σ)/σ) of the flow-matching path x = (1-σ)·clean + σ·noise, clamped away from its poles."""
    sigma = min(max(sigma, 1e-4), 1 - 1e-4)
    return math.log((1 - sigma) / sigma)
