"""A model on the bench: brought to the device for a row, measured as the row says, and taken off again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.speed.arithmetic import iteration_cost
from benchmarks.speed.compiling import CompiledBlocks
from benchmarks.speed.instruments import Clock
from benchmarks.speed.kernels import DEFAULT, MASKED, attention_rates, fastest, using, whole_rate
from benchmarks.speed.measure import Steady, measure_steady, measure_whole
from benchmarks.speed.rows import Row
from benchmarks.speed.subject import Subject
from benchmarks.speed.table import steady_row, whole_row


class Bench:
    """Measures one model's rows. Those of exact come before what is compared with them.

    Args:
        subject: the model.
        clock: of the device.
        ceiling: FLOP/s of the best matrix product there.
        backend: of `torch.compile`; None if there are no compiled rows.
    """

    def __init__(self, subject: Subject, clock: Clock, ceiling: float, backend: str | None) -> None:
        self.subject, self._clock, self._ceiling = subject, clock, ceiling
        self._blocks = None if backend is None else CompiledBlocks(subject.transformer, backend)
        self._attention = DEFAULT
        self._exact: dict[bool, Steady] = {}  # by whether it is compiled
        self._exact_video: dict[bool, float] = {}

    def look(self) -> dict[str, Any]:
        """Measure the attention kernels at the model's shapes and choose the one that its rows run with."""
        rates = attention_rates(self._clock, self.subject.attention_shape)
        self._attention = fastest(rates)
        cost = iteration_cost(self.subject)
        reached = whole_rate(rates, self._attention)
        return {
            "attention": self._attention,
            "attention_rates": rates,
            "exact_iteration": {
                "attention_pflops": cost.attention / 1e15,
                "other_pflops": cost.products / 1e15,
                "seconds_at_ceilings": None if reached is None else cost.seconds(reached, self._ceiling),
            },
        }

    def leave(self) -> None:
        """Make room on the device for another model."""
        self.subject.to(torch.device("cpu"))

    def measure(self, row: Row) -> dict[str, Any]:
        """The row's figures. Stock runs with the library's own choice of everything but a kernel that fails."""
        self.subject.to(self._clock.device)
        attention = MASKED if row.mode.config is None else self._attention
        compiling = self._blocks.on() if row.compiled else nullcontext({})
        with using(attention), compiling as graphs:
            figures = self._whole(row) if row.iterations is None else self._steady(row)
        return {**figures, "attention": attention, **graphs}

    def _steady(self, row: Row) -> dict[str, Any]:
        if row.cap_gib is None:
            measured, told = self._iterations(row), {}
        else:
            measured, fits = self._capped(row, row.cap_gib)
            told = {"cap_gib": row.cap_gib, "fits": fits}
        if row.mode.name == "exact":
            self._exact[row.compiled] = measured
        return {**steady_row(self.subject, row, measured, self._exact.get(row.compiled), self._ceiling), **told}

    def _iterations(self, row: Row) -> Steady:
        return measure_steady(self.subject, row.mode, self._clock, row.iterations, row.compiled)

    def _capped(self, row: Row, gib: float) -> tuple[Steady, bool | None]:
        """Measured with so much memory, or with all there is where that is too little; None if nothing caps it."""
        try:
            with self._clock.memory_cap(gib) as capped:
                return self._iterations(row), True if capped else None
        except torch.OutOfMemoryError:
            pass  # the figures are wanted all the same, and what failed is let go of first
        return self._iterations(row), False

    def _whole(self, row: Row) -> dict[str, Any]:
        whole = measure_whole(self.subject, row.mode, self._clock)
        if row.mode.name == "exact":
            self._exact_video[row.compiled] = whole["seconds"]
        return whole_row(self.subject, row, whole, self._exact_video.get(row.compiled), self._ceiling)
