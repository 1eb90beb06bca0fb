"""Rows of the table, as they stand in the JSON file."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.measure import Steady
from benchmarks.speed.rows import Row
from benchmarks.speed.subject import Mode, Subject, with_share


def steady_row(subject: Subject, row: Row, measured: Steady, exact: Steady | None, ceiling: float) -> dict[str, Any]:
    """The row of some iterations, scaled up to the video.

    Args:
        subject: the model.
        row: what was measured.
        measured: of it.
        exact: of the row of exact in the same form; None if it failed, and nothing can be compared or scaled by it.
        ceiling: FLOP/s of the best matrix product.
    """
    video_flops, video_seconds = _whole_video(subject, row.mode, measured, exact)
    rate = measured.flops / measured.seconds
    gpu = measured.gpu
    return {
        "model": subject.name,
        "mode": row.name,
        "share": _rounded(measured.share),
        "time_ratio": None if exact is None else _rounded(measured.seconds / exact.seconds),
        "seconds": _rounded(measured.seconds),
        "video_seconds": _rounded(video_seconds),
        "video_seconds_scaled_from": row.iterations,
        "video_pflops": _rounded(video_flops / 1e15),
        "tflops": _rounded(rate / 1e12),
        "fraction_of_ceiling": _rounded(rate / ceiling),
        "peak_gib": _rounded(measured.peak_gib),
        **measured.counts,
        "gpu_busy": None if gpu is None else _rounded(gpu.busy_seconds / measured.seconds),
        "warmup_seconds": _rounded(measured.warmup_seconds),
        "components": {label: _rounded(seconds) for label, seconds in measured.components.items()},
        "kernels": [] if gpu is None else [[name, calls, _rounded(seconds)] for name, calls, seconds in gpu.kernels],
    }


def whole_row(
    subject: Subject, row: Row, whole: dict[str, Any], exact_seconds: float | None, ceiling: float
) -> dict[str, Any]:
    """The row of a whole video; `seconds` is the mean iteration's, `exact_seconds` those of exact's whole video."""
    rate = whole["flops"] / whole["seconds"]
    return {
        "model": subject.name,
        "mode": row.name,
        "share": _rounded(whole["share"]),
        "time_ratio": None if exact_seconds is None else _rounded(whole["seconds"] / exact_seconds),
        "seconds": _rounded(whole["seconds"] / subject.video_iterations),
        "video_seconds": _rounded(whole["seconds"]),
        "video_seconds_scaled_from": None,
        "video_pflops": _rounded(whole["flops"] / 1e15),
        "tflops": _rounded(rate / 1e12),
        "fraction_of_ceiling": _rounded(rate / ceiling),
        "peak_gib": _rounded(whole["peak_gib"]),
    }


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Give every row `times_stock`: how much longer its video takes with the library's own forward."""
    stock = {row["model"]: row["video_seconds"] for row in rows if row["mode"] == "stock"}
    for row in rows:
        known = row["model"] in stock and row["video_seconds"] is not None
        row["times_stock"] = _rounded(stock[row["model"]] / row["video_seconds"]) if known else None


def _whole_video(subject: Subject, mode: Mode, measured: Steady, exact: Steady | None) -> tuple[float, float | None]:
    """FLOPs of the whole video, and its seconds by the rates that were measured."""
    if mode.config is None:
        return measured.flops * subject.video_iterations, measured.seconds * subject.video_iterations
    planned = with_share(subject.plan(), mode.share)
    full = subject.flops([record for record in planned if record.decision == "full"])
    flops = subject.flops(planned)
    if exact is None:
        return flops, None
    # Whole steps at exact's rate, the others at the rate that was measured of them.
    return flops, full * exact.seconds / exact.flops + (flops - full) * measured.seconds / measured.flops


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
