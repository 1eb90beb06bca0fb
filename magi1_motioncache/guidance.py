"""Three-way guidance: earlier chunks and text, each with its own strength over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.plan import ChunkCall, Pass, Role

RANGE_TOLERANCE = 1e-7  # a time equal to a range's lower end belongs to that range


@dataclass(frozen=True)
class PassWeights:
    """How much of each pass goes into a chunk's velocity."""

    text: float
    null: float
    uncond: float


def pass_weights(config: SamplingConfig, t: float) -> PassWeights:
    """Weights at time `t`: with scales P of the earlier chunks and T of the text, `T`, `P - T` and `1 - P`."""
    if config.cfg_number == 1:
        return PassWeights(text=1.0, null=0.0, uncond=0.0)
    # fp32 like the times: 0.3 and 0.1 are both a range's end and a time of the schedule.
    edges = torch.tensor(config.cfg_t_range, dtype=torch.float32) - RANGE_TOLERANCE
    index = int(torch.searchsorted(edges, torch.tensor(t, dtype=torch.float32))) - 1
    previous, text = config.prev_chunk_scales[index], config.text_scales[index]
    return PassWeights(text=text, null=previous - text, uncond=1 - previous)


def without_unused(config: SamplingConfig, calls: Sequence[ChunkCall]) -> list[ChunkCall]:
    """Drop the forwards that no result depends on.

    A forward of the text pass counts if its own velocity has weight or if a later chunk of the same pass that counts
    attends to its keys. The null pass always counts: its keys are kept.

    Args:
        config: how to sample.
        calls: one iteration of a plan.

    Returns:
        The calls that count, in the same order.
    """
    if config.cfg_number == 1:
        return list(calls)
    kept = []
    earliest_text = None
    for call in reversed(calls):
        weights = pass_weights(config, call.t)
        has_weight = call.role is Role.DENOISE and getattr(weights, call.branch.value) != 0
        if call.branch is Pass.TEXT:
            counts = has_weight or (earliest_text is not None and call.chunk >= earliest_text)
            if counts:
                earliest_text = call.kv_start if earliest_text is None else min(earliest_text, call.kv_start)
        else:
            counts = has_weight or call.branch is Pass.NULL
        if counts:
            kept.append(call)
    return kept[::-1]


def combine(config: SamplingConfig, t: float, velocities: dict[Pass, Tensor], near: Tensor | None = None) -> Tensor:
    """A chunk's velocity from those of its passes.

    Args:
        config: how to sample.
        t: the chunk's time.
        velocities: `[batch, channels, frames, height, width]` per pass; passes without weight may be missing.
        near: velocity of the copy without history, if one was run.

    Returns:
        `[batch, channels, frames, height, width]`.
    """
    if config.cfg_number == 1:
        velocity = velocities[Pass.TEXT]
        if near is None:
            return velocity
        return velocity * config.nearly_clean_scale + near * (1 - config.nearly_clean_scale)
    weights = pass_weights(config, t)
    terms = [getattr(weights, p.value) * velocities[p] for p in (Pass.UNCOND, Pass.NULL, Pass.TEXT) if p in velocities]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
