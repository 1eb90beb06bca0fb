"""TeaCache (arXiv 2411.19108): one decision per iteration for all active chunks of the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from common.cache.config import MotionCacheConfig
from common.cache.policy import (
    FULL,
    REUSE,
    Announcement,
    Choice,
    ChunkState,
    ChunkStep,
    ExactPolicy,
    Signals,
    check_distance,
    measured_change,
)


@dataclass
class TeaCachePolicy(ExactPolicy):
    """Adds up Δ of the active chunks taken together and computes them all when the sum reaches the threshold.

    The first `warmup_steps` iterations of a window are computed. A chunk that has nothing cached yet is computed by
    itself at an iteration that reuses, as the public code for MAGI-1 does; the public code for SkyReels-V2 runs chunks
    that have not begun along with the others, so there they have something to reuse from the start.

    Raises:
        UserError: the config measures the time modulation and has no polynomial.
    """

    config: MotionCacheConfig
    joint = True
    _accumulated: dict[str, Tensor | float] = field(default_factory=dict)
    _computes: bool = True

    def __post_init__(self) -> None:
        check_distance(self.config)

    def start_window(self) -> None:
        self._accumulated.clear()

    def announce(self, active: Sequence[Announcement], group: str) -> None:
        change = measured_change(self.config, active)
        total = self._accumulated.get(group, 0.0) + change
        self._computes = active[0][0].iteration < self.config.warmup_steps or bool(total >= self.config.threshold)
        self._accumulated[group] = 0.0 if self._computes else total

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        return FULL if self._computes or state.buffer.last is None else REUSE
