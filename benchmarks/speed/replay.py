"""A decision schedule, recorded or uniform, and a policy that follows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cache import Trace, mask
from common.cache.config import MotionCacheConfig
from common.cache.policy import FULL, REUSE, Choice, ChunkState, ChunkStep, MotionCachePolicy, Signals, measured_change
from common.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Share of a chunk's tokens that each step computes.

    Attributes:
        shares: per branch and chunk, one share per step.
    """

    shares: dict[tuple[str, int], list[float]]

    @classmethod
    def of(cls, trace: Trace) -> Schedule:
        """What a trace of one window records of the chunks that were denoised."""
        shares: dict[tuple[str, int], list[float]] = {}
        for record in trace.records:
            if record.window == 0 and record.role == "denoise":
                shares.setdefault((record.branch, record.chunk), []).append(record.tokens / record.tokens_total)
        return cls(shares)

    @classmethod
    def read(cls, path: Path) -> Schedule:
        """The schedule of a run's `trace.json`.

        Raises:
            UserError: the file is no trace.
        """
        try:
            return cls.of(Trace.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"schedule {str(path)!r} cannot be read ({error}); give the trace.json of a run of the same model"
            ) from error

    def share(self, step: ChunkStep) -> float:
        """The share at a step. A schedule of fewer chunks goes on with its last one; other step counts are resampled.

        Raises:
            UserError: the schedule has no such branch.
        """
        chunks = [chunk for branch, chunk in self.shares if branch == step.branch]
        if not chunks:
            branches = ", ".join(sorted({branch for branch, _ in self.shares}))
            raise UserError(
                f"the schedule has no branch {step.branch!r}, only {branches}; record one of the same model"
            )
        shares = self.shares[step.branch, min(step.chunk, max(chunks))]
        return shares[step.step * len(shares) // step.num_steps] if step.step < step.num_steps else 1.0


class ReplayPolicy(MotionCachePolicy):
    """Computes as many tokens as a schedule says, the most urgent ones by MotionCache's accumulators and weights.

    Values of random weights decide nothing that way, and the work of deciding is done all the same.
    """

    def __init__(self, config: MotionCacheConfig, schedule: Schedule) -> None:
        super().__init__(config)
        self.schedule = schedule

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        change = measured_change(self.config, [(step, state, signals)])
        if state.accumulated is None:
            state.accumulated = signals.inputs.new_zeros(step.tokens, dtype=torch.float32)
            return FULL
        state.accumulated = state.accumulated + (1.0 if state.weights is None else state.weights) * change
        count = round(self.schedule.share(step) * step.tokens)
        if count == 0:
            return REUSE
        count = mask.bucketed(count, self.config.bucket, step.tokens)
        if count == step.tokens:
            state.accumulated.zero_()
            return FULL
        tokens = mask.most_urgent(state.accumulated, count)
        state.accumulated[tokens] = 0.0
        return Choice("select", tokens)
