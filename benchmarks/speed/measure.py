"""Measures one mode of one model: a few steady iterations, or the whole video."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.speed.instruments import Clock, Counter, Mark, Regions
from benchmarks.speed.subject import WHOLE, Mode, Session, Subject
from common.cache import Record

WARMING = 2
"""Iterations that are not timed: the first computes all tokens, the second meets the shapes of selected ones."""
EXTRA = 2
"""Iterations after the timed ones: one with parts timed apart, one with host reads and launches counted."""


@dataclass(frozen=True)
class Steady:
    """What steady iterations of a mode took, per iteration.

    Attributes:
        seconds: in the device's time.
        flops: of the forwards; for the library's own forward, of the block-causal area.
        share: tokens computed, of all tokens of the chunks being denoised.
        peak_gib: most memory in tensors, weights included; None on a CPU.
        components: seconds of one more iteration by part; the marks themselves cost time there.
        counts: host reads, waits and launches of one more iteration.
    """

    seconds: float
    flops: float
    share: float
    peak_gib: float | None
    components: dict[str, float]
    counts: dict[str, int | None]


def measure_steady(subject: Subject, mode: Mode, clock: Clock, iterations: int, compiled: bool) -> Steady:
    """Time `iterations` iterations in which all chunks are active, then look at two more closely."""
    span = subject.steady(WARMING + iterations + EXTRA)
    marks: list[Mark] = []
    regions, counter = Regions(clock), Counter(clock.device)

    def after_iteration() -> None:
        marks.append(clock.mark())
        if len(marks) == WARMING + iterations:
            regions.start()
        elif len(marks) == WARMING + iterations + 1:
            regions.stop()
            counter.start()
        elif len(marks) == WARMING + iterations + 2:
            counter.stop()

    clock.restart_peak()
    with subject.session(mode, span) as session:
        parts = session.compiled_parts if compiled else session.parts
        with regions.installed(parts), counter.installed(*session.model):
            session.denoise(after_iteration)
        timed = _steps(session, WARMING, iterations)
    if timed is None:
        flops, share = subject.stock_flops(), 1.0
    else:
        flops = subject.flops(timed) / iterations
        share = sum(r.tokens for r in timed) / sum(r.tokens_total for r in timed)
    return Steady(
        seconds=clock.seconds(marks[WARMING - 1], marks[WARMING + iterations - 1]) / iterations,
        flops=flops,
        share=share,
        peak_gib=clock.peak_gib(),
        components=regions.seconds(),
        counts=asdict(counter.counts()),
    )


def _steps(session: Session, first: int, count: int) -> list[Record] | None:
    """Records of iterations `first` to `first + count - 1` of a session."""
    if session.records is None:
        return None
    start = min(record.iteration for record in session.records) + first
    return [record for record in session.records if start <= record.iteration < start + count]


def measure_whole(subject: Subject, mode: Mode, clock: Clock) -> dict[str, Any]:
    """Denoise the whole video; its seconds, FLOPs and token share."""
    clock.restart_peak()
    with subject.session(mode, WHOLE) as session:
        start = clock.mark()
        session.denoise(lambda: None)
        seconds = clock.seconds(start, clock.mark())
        records = session.records
    return {
        "seconds": seconds,
        "flops": subject.flops(records),
        "share": sum(r.tokens for r in records) / sum(r.tokens_total for r in records),
        "peak_gib": clock.peak_gib(),
    }
