"""Measures what leaving a step out costs, to set distances by: how the residual changes, or how the result does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from common.cache.distance import relative_l1
from common.cache.policy import FULL, REUSE, Choice, ChunkState, ChunkStep, ExactPolicy, Signals


@dataclass(frozen=True)
class StepChange:
    """Relative L1 changes of one chunk and guidance pass between its last call and this one.

    Attributes:
        step: of this call.
        steps: how many the last call is back; more than 1 for a guidance pass that was left out in between.
        residual: change of the block stack's output minus its input.
        inputs: change of what enters the block stack.
        modulation: change of the time modulation; None for a model that has none.
    """

    step: int
    steps: int
    residual: float
    inputs: float
    modulation: float | None


@dataclass
class ChangeRecorder(ExactPolicy):
    """A policy that computes everything and notes what a perfect distance would have said.

    Put it in place of a caching config's policy for one run, which it makes exact; `samples` then holds one entry per
    chunk, guidance pass and step after the first. With `method="exact"` nothing would be told to it; that is refused.
    """

    samples: list[StepChange] = field(default_factory=list)
    _last: dict[tuple[int, str], tuple[int, Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    def start_window(self) -> None:
        self._last.clear()

    def observe(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> None:
        """Compare with the same chunk's last call."""
        key = step.chunk, step.branch
        residual, inputs, modulation = outputs - signals.inputs, signals.inputs, signals.modulation
        if key in self._last:
            last_step, last_residual, last_inputs, last_modulation = self._last[key]
            self.samples.append(
                StepChange(
                    step.step,
                    step.step - last_step,
                    float(relative_l1(residual, last_residual)),
                    float(relative_l1(inputs, last_inputs)),
                    None if modulation is None else float(relative_l1(modulation, last_modulation)),
                )
            )
        if step.step == step.num_steps - 1:
            self._last.pop(key, None)  # a long video has many chunks, few of them at work
        else:
            self._last[key] = step.step, residual, inputs, modulation


@dataclass
class StepSkipper(ExactPolicy):
    """A policy that computes the first chunk at all its steps but one, and other chunks only where they begin.

    No chunk attends to a later one, so the first comes out as it would beside computed ones, at the price of one chunk.

    Args:
        skip: step at which the first chunk reuses what it has; None computes all.

    Attributes:
        frames: latent frames of the first chunk, once it was met.
    """

    skip: int | None = None
    frames: int | None = field(default=None, init=False)
    _first: int | None = field(default=None, init=False)

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        if self._first is None:  # chunks begin in causal order
            self._first, self.frames = step.chunk, step.grid[0]
        wanted = step.chunk == self._first and step.step != self.skip
        return FULL if wanted or state.buffer.last is None else REUSE


def sensitivity_table(errors: Sequence[Sequence[float]]) -> list[float]:
    """Distance per step by what reusing it alone does to the finished chunk, `[num_steps]`, with four digits.

    A value that follows a line is off by the square of the gap, and what a gap leaves in the result is the sum of such
    values: its cube. The distance is therefore the cube root of the error, so that sums over gaps compare.

    Args:
        errors: for each video and step the error of the result, `[videos][num_steps]`. Step 0 is never reused; its
            entry is 0.
    """
    return [0.0] + [float(f"{np.mean(values) ** (1 / 3):.4g}") for values in list(zip(*errors, strict=True))[1:]]


def distance_table(samples: list[StepChange], num_steps: int) -> list[float]:
    """Mean residual change per step, `[num_steps]`, with four digits; entry 0 is 0.

    A change over several steps counts as made evenly in each of them.

    Raises:
        ValueError: a step has no sample.
    """
    by_step: list[list[float]] = [[] for _ in range(num_steps)]
    for sample in samples:
        for step in range(sample.step - sample.steps + 1, sample.step + 1):
            by_step[step].append(sample.residual / sample.steps)
    missing = [k for k in range(1, num_steps) if not by_step[k]]
    if missing:
        raise ValueError(f"no samples of steps {missing}; record whole exact runs of {num_steps} steps")
    return [0.0] + [float(f"{np.mean(values):.4g}") for values in by_step[1:]]


def fit_polynomial(samples: list[StepChange], degree: int = 4) -> list[float]:
    """TeaCache's rescaling for this model: residual change as a polynomial of the modulation's, highest power first.

    Raises:
        ValueError: the model has no time modulation.
    """
    pairs = [(s.modulation, s.residual) for s in samples if s.steps == 1 and s.modulation is not None]
    if not pairs:
        raise ValueError("no samples of a time modulation; this model has none")
    x, y = np.array(pairs).T
    return [float(c) for c in np.polyfit(x, y, degree)]
