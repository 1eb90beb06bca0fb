"""Which rows the table has, and in which order: a run that is cut off has the most telling ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.speed.replay import Schedule
from benchmarks.speed.subject import WARMUP_STEPS, Mode, Subject, paper_share
from common.cache import MotionCacheConfig

STOCK_ITERATIONS = 2
OFFLOADED_ITERATIONS = 1
OFFLOADED_SHARE = 0.25
CARD_GIB = 24.0
"""Memory of the smaller card that K/V in main memory or in 8 bits are meant for."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        mode: what runs.
        iterations: that are timed; None denoises the whole video.
        compiled: whether blocks are.
        cap_gib: memory that it is first tried with; None has no limit.
    """

    mode: Mode
    iterations: int | None
    compiled: bool = False
    cap_gib: float | None = None

    @property
    def name(self) -> str:
        ends = [", compiled"] * self.compiled + [", whole video"] * (self.iterations is None)
        return self.mode.name + "".join(ends)


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    Attributes:
        iterations: timed per row.
        shares: of tokens, a row each.
        stock, compiled, whole: whether there are rows of the library's forward, of compiled blocks, of whole videos.
        schedule: name and decisions of a recorded run to follow.
    """

    iterations: int
    shares: Sequence[float]
    stock: bool
    compiled: bool
    whole: bool
    schedule: tuple[str, Schedule] | None


def stages(subject: Subject, wanted: Wanted) -> list[list[Row]]:
    """A model's rows, stage by stage: eager, compiled, for a smaller card, other shares, whole videos.

    Exact comes first in its form, what is compared with it after. With several models, all begin a stage before one
    begins the next.
    """
    exact = Mode("exact", MotionCacheConfig(method="exact"))
    paper = _paper(subject, subject.cached)
    eager = [Row(exact, wanted.iterations), Row(paper, wanted.iterations)]
    if wanted.stock and subject.has_stock:
        eager.append(Row(Mode("stock", None), STOCK_ITERATIONS))
    if wanted.schedule is not None:
        name, schedule = wanted.schedule
        eager.append(
            Row(Mode(f"replay {name}", subject.cached.replace(budget=None), schedule=schedule), wanted.iterations)
        )
    compiled = [Row(mode, wanted.iterations, compiled=True) for mode in (exact, paper)]
    small = [
        Row(_offloaded(mode), OFFLOADED_ITERATIONS, cap_gib=CARD_GIB)
        for mode in (exact, _cached(subject, OFFLOADED_SHARE))
    ]
    small.append(Row(_packed(paper), wanted.iterations, cap_gib=CARD_GIB))  # beside the eager row of the same compute
    shares = [Row(_cached(subject, share), wanted.iterations) for share in wanted.shares]
    if wanted.compiled:
        shares += [replace(row, compiled=True) for row in shares]
    warmed = _paper(subject, subject.cached.replace(warmup_steps=WARMUP_STEPS))
    whole = [Row(mode, None, wanted.compiled) for mode in (exact, warmed)]
    return [eager, compiled if wanted.compiled else [], small, shares, whole if wanted.whole else []]


def _cached(subject: Subject, share: float) -> Mode:
    return Mode(f"cached {share:g}", subject.cached.replace(budget=share), share)


def _paper(subject: Subject, config: MotionCacheConfig) -> Mode:
    """The share of tokens that takes the paper's part of the vanilla FLOPs over the whole video."""
    share = paper_share(subject)
    return Mode(f"paper {subject.paper[0]:g} of {subject.paper[1]:g} PFLOP", config.replace(budget=share), share)


def _offloaded(mode: Mode) -> Mode:
    return replace(mode, name=f"{mode.name}, K/V in main memory", config=mode.config.replace(state_device="cpu"))


def _packed(mode: Mode) -> Mode:
    return replace(mode, name=f"{mode.name}, K/V in 8 bits", config=mode.config.replace(kv_dtype="int8"))
