"""Measures how much a model's residual really changes from step to step, to set distances by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from common.cache.distance import relative_l1
from common.cache.policy import ChunkState, ChunkStep, ExactPolicy, Signals


@dataclass(frozen=True)
class StepChange:
    """Relative L1 changes of one chunk between its previous step and this one."""

    step: int
    residual: float
    modulation: float
    inputs: float


@dataclass
class ChangeRecorder(ExactPolicy):
    """A policy that computes everything and notes what a perfect distance would have said.

    Put it in place of an engine's policy for an exact run; `samples` then holds one entry per chunk, branch and step
    after the first.
    """

    samples: list[StepChange] = field(default_factory=list)
    _previous: dict[tuple[int, int, str], tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def observe(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> None:
        """Compare with the same chunk's previous step."""
        now = (outputs - signals.inputs, signals.modulation, signals.inputs)
        key = (step.window, step.chunk, step.branch)
        last_step, *before = self._previous.get(key, (None,))
        if last_step == step.step - 1:
            changes = [float(relative_l1(a, b)) for a, b in zip(now, before, strict=True)]
            self.samples.append(StepChange(step.step, *changes))
        self._previous[key] = (step.step, *now)

    def start_video(self) -> None:
        """Forget the last video's tensors; the samples stay."""
        self._previous.clear()


def distance_table(samples: list[StepChange], num_steps: int) -> list[float]:
    """Mean residual change per step, `[num_steps]`; entry 0 is 0.

    Raises:
        ValueError: a step has no sample.
    """
    by_step: list[list[float]] = [[] for _ in range(num_steps)]
    for sample in samples:
        by_step[sample.step].append(sample.residual)
    missing = [k for k in range(1, num_steps) if not by_step[k]]
    if missing:
        raise ValueError(f"no samples of steps {missing}; record whole exact runs of {num_steps} steps")
    return [0.0] + [float(np.mean(values)) for values in by_step[1:]]


def fit_polynomial(samples: list[StepChange], degree: int = 4) -> list[float]:
    """TeaCache's rescaling for this model: residual change as a polynomial of the modulation's, highest power first."""
    x = np.array([s.modulation for s in samples])
    y = np.array([s.residual for s in samples])
    return [float(c) for c in np.polyfit(x, y, degree)]
