"""Chooses a cache's settings by measuring: the distance's table, the threshold for a target, and what else is tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from benchmarks.runs import Runs
from benchmarks.search import Curve, Point, Target, search
from benchmarks.takes import Take
from common.cache import MotionCacheConfig
from common.cache.calibration import distance_table, fit_polynomial, sensitivity_table
from common.cache.foretell import is_foretellable
from common.errors import UserError

Distance = Literal["keep", "table", "sensitivity", "modulation"]
Tunable = Literal["alpha", "chunk_phase"]
TUNABLE: tuple[Tunable, ...] = get_args(Tunable)
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
CHUNK_PHASES = (0.0, 0.1, 0.2, 0.4)
"""Lengths of the chunk phase that are tried, as parts of all steps."""
TOLD_ROUNDS = 40
MEAN_WEIGHT = 0.8
"""A first guess: weights slow the sums of tokens down by so much, so τ is lower by so much for the same share."""

OnPoint = Callable[[MotionCacheConfig, Point], None]


@dataclass(frozen=True)
class Trial:
    """One way of caching at a target.

    Attributes:
        cache: with the threshold of `point`.
        point: nearest to the target.
        curve: all that was measured of it.
        merit: what counts at the target: PSNR in dB, or for a target of PSNR the negative share.
    """

    cache: MotionCacheConfig
    point: Point
    curve: Curve
    merit: float


def check_searchable(cache: MotionCacheConfig, tuned: Sequence[Tunable] = ()) -> None:
    """Raise a `UserError` unless the threshold decides what is computed, and so do the settings to be tuned."""
    if cache.method == "exact":
        raise UserError("method: 'exact' has no threshold to find; choose --method or --preset of a caching one")
    if cache.budget is not None:
        raise UserError(f"budget: {cache.budget:g} stands in place of the threshold; set budget to null to find one")
    if tuned and not cache.token_level:
        raise UserError(f"--tune {tuned[0]}: only token-level caching has it; choose --method motioncache")


def measure_distance(
    runs: Runs, cache: MotionCacheConfig, distance: Distance, takes: Sequence[Take]
) -> MotionCacheConfig:
    """A cache with its distance measured on exact runs of this model.

    Args:
        runs: makes them.
        cache: to change.
        distance: `table` (mean change of the residual per step), `sensitivity` (a table too: what the result loses when
            a step is left out), `modulation` (a polynomial of the time modulation's change) or `keep`.
        takes: videos to measure on.

    Raises:
        UserError: the model has no time modulation.
    """
    if distance == "keep":
        return cache
    if distance == "sensitivity":
        return cache.replace(distance="table", distance_table=sensitivity_table(runs.skips(cache, takes)))
    if distance == "modulation" and runs.changes(takes[:1])[0].modulation is None:
        raise UserError("--distance modulation: this model has no time modulation; choose 'table' or 'keep'")
    changes = runs.changes(takes)
    if distance == "modulation":
        return cache.replace(distance="modulation", polynomial=fit_polynomial(changes))
    steps = 1 + max(change.step for change in changes)
    return cache.replace(distance="table", distance_table=distance_table(changes, steps))


def told_curve(runs: Runs, cache: MotionCacheConfig, take: Take) -> Curve:
    """Shares of a cache whose decisions are known from one exact run (see `is_foretellable`)."""
    return Curve(lambda tau: Point(tau, runs.foretold_share(cache.replace(threshold=tau), take)))


def tell_threshold(runs: Runs, cache: MotionCacheConfig, target: Target, take: Take) -> Point:
    """The threshold nearest to a share, for a cache whose decisions are known from one exact run."""
    return search(told_curve(runs, cache, take), target, cache.threshold, tolerance=0.0, rounds=TOLD_ROUNDS)


def measured_curve(
    runs: Runs, cache: MotionCacheConfig, takes: Sequence[Take], frames: bool, on_point: OnPoint | None = None
) -> Curve:
    """Points of a cache over its threshold, each the mean of runs with all prompts.

    Args:
        runs: makes them.
        cache: whose threshold varies.
        takes: videos to make.
        frames: whether PSNR is wanted.
        on_point: called with each point that is measured.
    """

    def measure(threshold: float) -> Point:
        config = cache.replace(threshold=threshold)
        point = runs.point(config, takes, frames)
        if on_point is not None:
            on_point(config, point)
        return point

    return Curve(measure)


def find_threshold(runs: Runs, target: Target, curve: Curve, cache: MotionCacheConfig, take: Take) -> Point:
    """The measured point of a cache that is nearest to a target.

    Args:
        runs: makes what is missing.
        target: what to reach.
        curve: of the cache.
        cache: its settings; the threshold is a first guess, where nothing was measured and nothing can be foretold.
        take: a video to foretell chunk-level decisions for.

    Raises:
        UserError: the target cannot be reached.
    """
    start = cache.threshold or MotionCacheConfig().threshold
    if not curve.points and target.kind == "share" and cache.method == "motioncache":
        per_chunk = cache.replace(alpha=1.0, threshold=start)
        if is_foretellable(per_chunk):
            start = tell_threshold(runs, per_chunk, target, take).threshold
            start *= MEAN_WEIGHT if cache.token_level else 1.0
    return search(curve, target, start)


def tune(
    runs: Runs,
    cache: MotionCacheConfig,
    target: Target,
    names: Sequence[Tunable],
    takes: Sequence[Take],
    steps: int,
    on_point: OnPoint,
) -> list[Trial]:
    """Find the threshold, and the best value of each named setting, one setting after the other.

    Each candidate is brought to the target by its threshold; then the highest PSNR wins, or for a target of PSNR the
    lowest share of compute, read from the candidate's curve where it passes the target.

    Args:
        runs: makes what is missing.
        cache: to begin with.
        target: what to reach.
        names: settings to tune; without any there is one trial.
        takes: videos to choose on.
        steps: denoising steps of a chunk.
        on_point: called with each point that is measured.

    Returns:
        All trials, the best one first.

    Raises:
        UserError: the target cannot be reached.
    """
    trials: dict[MotionCacheConfig, Trial] = {}

    def attempt(config: MotionCacheConfig) -> Trial:
        key = config.replace(threshold=0.0)
        if key not in trials:
            curve = measured_curve(runs, config, takes, True, on_point)
            point = find_threshold(runs, target, curve, config, takes[0])
            merit = curve.value_at(target, lambda p: -p.share if target.kind == "psnr" else p.psnr_db)
            trials[key] = Trial(config.replace(threshold=point.threshold), point, curve, merit)
        return trials[key]

    best = attempt(cache)
    for name in names:
        if not best.cache.token_level:
            break  # the best weights are equal ones, which leave nothing to tune
        own = getattr(best.cache, name)
        values = ALPHAS if name == "alpha" else tuple(round(part * steps) for part in CHUNK_PHASES)
        candidates = [best.cache.replace(**{name: value}) for value in dict.fromkeys((own, *values))]
        best = max(map(attempt, candidates), key=lambda trial: trial.merit)
    return [best, *(trial for trial in trials.values() if trial is not best)]
