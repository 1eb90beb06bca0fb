"""Finds the threshold that reaches a target, from few measurements.

Share of compute, time and PSNR all fall as the threshold rises, and what they are above their lowest value (everything
reused after warm-up) falls roughly as 1/τ: the number of computed steps is the whole change divided by τ. So the search
is for a straight line in log(figure - lowest) over log τ, kept between the nearest measured points on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from common.errors import UserError
from common.metrics import MAX_PSNR

NEVER = 1e9
"""A threshold that no sum of changes reaches: all is reused after warm-up."""
DIGITS = 4
"""Thresholds are rounded to so many digits before they are measured, so that what is written is what was measured."""
TOLERANCE = 0.01
"""Relative distance from the target at which a search ends."""
REACH = 0.05
"""Relative distance from the target that still counts as reaching it."""
ROUNDS = 10
"""Most measurements of a search."""
NARROWEST = 1.01  # ratio of two thresholds that are not told apart any more
NEXT, WIDEST = 1.3, 16.0  # least and greatest factor of a step out of the measured range
FLAT = 0.98  # share from which everything is computed, and the curve says nothing of where it begins to fall
MARGIN = 0.2  # of a bracket, on both sides, where no point is put: steps in the curve mislead a straight line

Kind = Literal["share", "speedup", "psnr"]


@dataclass(frozen=True)
class Point:
    """What a threshold gives, over all prompts.

    Attributes:
        threshold: τ.
        share: FLOPs over those of exact execution, mean.
        speedup: seconds of exact execution over those of this one, summed over prompts; None if not timed.
        psnr_db: against exact execution, mean; None if not decoded.
        psnr_ci95: half width of its 95 % interval over prompts; None if there is one prompt.
        prompts: how many.
    """

    threshold: float
    share: float
    speedup: float | None = None
    psnr_db: float | None = None
    psnr_ci95: float | None = None
    prompts: int = 1

    def __str__(self) -> str:
        figures = [f"compute {self.share:.3f} of exact's"]
        if self.speedup is not None:
            figures.append(f"{self.speedup:.2f}x as fast")
        if self.psnr_db is not None:
            figures.append(f"{self.psnr_db:.2f} dB")
        return ", ".join(figures)


@dataclass(frozen=True)
class Target:
    """What to reach: `share` of exact's FLOPs, `speedup` against exact, or `psnr` in dB against exact."""

    kind: Kind
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """`share=0.3`, `speedup=2` or `psnr=30`.

        Raises:
            UserError: the form, the kind or the value is wrong.
        """
        kind, equals, value = text.partition("=")
        if not equals or kind not in get_args(Kind):
            raise UserError(f"target {text!r} is not allowed; give share=0.3, speedup=2 or psnr=30, with a number")
        low, high = {"share": (0.01, 1.0), "speedup": (1.0, 1000.0), "psnr": (1.0, MAX_PSNR)}[kind]
        try:
            figure = float(value)
        except ValueError:
            figure = math.nan
        if not low <= figure <= high:
            raise UserError(f"target {text!r} is not allowed; give {kind}={low:g} to {kind}={high:g}")
        return cls(kind, figure)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    def of(self, point: Point) -> float:
        """The figure of a point that the target is about."""
        value = {"share": point.share, "speedup": point.speedup, "psnr": point.psnr_db}[self.kind]
        if value is None:
            raise ValueError(f"{self.kind} was not measured")
        return value

    def miss(self, point: Point) -> float:
        """Relative distance of a point from the target."""
        return abs(self.of(point) - self.value) / self.value

    def level(self, point: Point) -> float:
        """The figure in a form that falls as the threshold rises: a speedup as its inverse."""
        return 1 / self.of(point) if self.kind == "speedup" else self.of(point)

    @property
    def wanted(self) -> float:
        """The target in the form of `level`."""
        return 1 / self.value if self.kind == "speedup" else self.value

    def check_reachable(self, lowest: Point) -> None:
        """Refuse a target beyond what reusing everything after warm-up gives.

        Raises:
            UserError: says what can be reached.
        """
        if self.level(lowest) <= self.wanted * (1 + REACH):
            return
        end = self.of(lowest)
        found = {
            "share": f"the least is {end:.3f}; choose share={math.ceil(end * 1000) / 1000:g} to 1",
            "speedup": f"the most is {end:.2f}; choose speedup=1 to {math.floor(end * 100) / 100:g}",
            "psnr": f"the least is {end:.2f} dB; choose psnr={math.ceil(end * 100) / 100:g} or more",
        }[self.kind]
        raise UserError(
            f"target {self} cannot be reached: with everything reused after warm-up {found}, or change warmup_steps"
        )


class Curve:
    """Points of one way of caching over its threshold, each measured once.

    Args:
        measure: makes the point of a threshold.
    """

    def __init__(self, measure: Callable[[float], Point]) -> None:
        self._measure = measure
        self._points: dict[float, Point] = {}

    @property
    def points(self) -> list[Point]:
        """All that was measured, in order of the threshold."""
        return [self._points[threshold] for threshold in sorted(self._points)]

    def at(self, threshold: float) -> Point:
        """The point of a threshold."""
        if threshold not in self._points:
            self._points[threshold] = self._measure(threshold)
        return self._points[threshold]

    def value_at(self, target: Target, value: Callable[[Point], float]) -> float:
        """A figure where the curve passes the target, on a straight line between the nearest points."""
        points = sorted(self.points, key=target.level)
        return float(np.interp(target.wanted, [target.level(p) for p in points], [value(p) for p in points]))


def search(curve: Curve, target: Target, start: float, tolerance: float = TOLERANCE, rounds: int = ROUNDS) -> Point:
    """The measured point nearest to a target.

    It begins with the lowest point and with `start`, or with what the curve holds from searches for other targets.

    Args:
        curve: what to measure.
        target: what to reach.
        start: a first guess of the threshold.
        tolerance: relative distance from the target that is near enough.
        rounds: most measurements.

    Raises:
        UserError: the target is below the lowest point.
    """
    lowest = curve.at(NEVER)
    target.check_reachable(lowest)
    if target.wanted <= target.level(lowest):
        return lowest
    threshold: float | None = rounded(start)
    if any(p.threshold != NEVER for p in curve.points):
        threshold = next_threshold(curve.points, lowest, target)
    for _ in range(rounds):
        best = min(curve.points, key=target.miss)
        if threshold is None or target.miss(best) <= tolerance:
            break
        curve.at(threshold)
        threshold = next_threshold(curve.points, lowest, target)
    return min(curve.points, key=target.miss)


def next_threshold(points: list[Point], lowest: Point, target: Target) -> float | None:
    """Where to measure next; None where the curve jumps over the target and nothing lies between.

    Args:
        points: measured so far, in order of the threshold.
        lowest: the point of `NEVER`.
        target: what to reach.
    """
    inner = [p for p in points if p.threshold != NEVER]
    high = next((p for p in inner if target.level(p) <= target.wanted), None)
    low = next((p for p in reversed(inner) if high is None or p.threshold < high.threshold), None)
    edge = high or low
    if edge is None:
        raise ValueError("no point to go on from")

    def above(level: float) -> float:
        return math.log(max(level - target.level(lowest), 1e-6 * target.wanted))

    if low is None or high is None:
        factor = math.exp(above(target.level(edge)) - above(target.wanted))
        if high is None:
            factor = WIDEST if edge.share > FLAT else min(max(factor, NEXT), WIDEST)
        else:
            factor = max(min(factor, 1 / NEXT), 1 / WIDEST)
        return rounded(edge.threshold * factor)
    width = math.log(high.threshold / low.threshold)
    if width < math.log(NARROWEST):
        return None
    fall = above(target.level(low)) - above(target.level(high))
    part = (above(target.level(low)) - above(target.wanted)) / fall
    at = inner.index(high)
    if _is_level(inner[max(at - 2, 0) : at], target) or _is_level(inner[at : at + 2], target):
        part = 0.5  # the curve jumps between two steps, and a straight line would only creep up to the jump
    threshold = rounded(low.threshold * math.exp(width * min(max(part, MARGIN), 1 - MARGIN)))
    return None if threshold in (low.threshold, high.threshold) else threshold


def _is_level(points: list[Point], target: Target) -> bool:
    return len(points) == 2 and target.level(points[0]) == target.level(points[1])


def rounded(threshold: float) -> float:
    """A threshold with as many digits as are written."""
    return float(f"{threshold:.{DIGITS}g}")
