"""Measures one mode of one model: a few steady iterations, or the whole video."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.speed.instruments import Clock, Mark, Regions
from benchmarks.speed.profiling import GpuWork, Profiler, gpu_work, host_counts
from benchmarks.speed.subject import WHOLE, Mode, Session, Subject
from common.cache import Record

WARMING = 2
"""Iterations that are not timed: the first computes all tokens, the second meets the shapes of selected ones."""
EXTRA = 2
"""Iterations after the timed ones: one with parts timed apart, one with host reads and launches counted."""


def steady_iterations(timed: int) -> int:
    """Iterations that a row of `timed` ones takes."""
    return WARMING + timed + EXTRA


@dataclass(frozen=True)
class Steady:
    """What steady iterations of a mode took, per iteration.

    Attributes:
        seconds: in the device's time.
        flops: of the forwards; for the library's own forward, of the block-causal area.
        share: tokens computed, of all tokens of the chunks being denoised.
        peak_gib: most memory in tensors, weights included; None on a CPU.
        warmup_seconds: of the iterations before the timed ones, with compiling if there is any.
        components: seconds of one more iteration by part; the marks themselves cost time there.
        counts: host reads, waits and launches of one more iteration.
        gpu: its kernels; None on a CPU.
    """

    seconds: float
    flops: float
    share: float
    peak_gib: float | None
    warmup_seconds: float
    components: dict[str, float]
    counts: dict[str, int | None]
    gpu: GpuWork | None


def measure_steady(subject: Subject, mode: Mode, clock: Clock, iterations: int, compiled: bool) -> Steady:
    """Time `iterations` iterations in which all chunks are active, then look at two more closely."""
    span = subject.steady(steady_iterations(iterations))
    marks: list[Mark] = []
    regions, profiler = Regions(clock), Profiler(clock.device)

    def after_iteration() -> None:
        marks.append(clock.mark())
        if len(marks) == WARMING + iterations:
            regions.start()
        elif len(marks) == WARMING + iterations + 1:
            regions.stop()
            profiler.start()
        elif len(marks) == WARMING + iterations + 2:
            profiler.stop()

    clock.restart_peak()
    with subject.session(mode, span) as session:
        parts = session.compiled_parts if compiled else session.parts
        with regions.installed(parts), profiler.installed(*session.model):
            began = clock.mark()
            session.denoise(after_iteration)
        timed = _steps(session, WARMING, iterations)
    if timed is None:
        flops, share = subject.stock_flops(), 1.0
    else:
        flops = subject.flops(timed) / iterations
        share = sum(r.tokens for r in timed) / sum(r.tokens_total for r in timed)
    events = profiler.events()
    return Steady(
        seconds=clock.seconds(marks[WARMING - 1], marks[WARMING + iterations - 1]) / iterations,
        flops=flops,
        share=share,
        peak_gib=clock.peak_gib(),
        warmup_seconds=clock.seconds(began, marks[WARMING - 1]),
        components=regions.seconds(),
        counts=asdict(host_counts(events, cuda=clock.device.type == "cuda")),
        gpu=gpu_work(events),
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
