"""Rows of the table, in JSON and Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.measure import Steady
from benchmarks.speed.subject import Mode, Subject, with_share

COLUMNS = {
    "model": "model",
    "mode": "mode",
    "share": "share of tokens",
    "time_ratio": "time / exact",
    "seconds": "s / iteration",
    "video_seconds": "video s",
    "video_pflops": "video PFLOP",
    "tflops": "TFLOP/s",
    "fraction_of_ceiling": "of ceiling",
    "peak_gib": "peak GiB",
    "host_reads": "host reads",
    "syncs": "syncs",
    "loop_syncs": "loop syncs",
    "launches": "launches",
}


def steady_row(
    subject: Subject, mode: Mode, measured: Steady, exact: Steady | None, iterations: int, ceiling: float
) -> dict[str, Any]:
    """One mode's row. `exact` is None until exact itself was measured; the row then has no time ratio."""
    if mode.config is None:
        video_flops = measured.flops * subject.video_iterations
        video_seconds = measured.seconds * subject.video_iterations
    else:
        planned = with_share(subject.plan(), mode.share)
        full = subject.flops([record for record in planned if record.decision == "full"])
        video_flops = subject.flops(planned)
        # Whole steps at exact's rate, the others at the rate that was measured of them.
        whole_steps = exact if exact is not None else measured
        rates = (whole_steps.flops / whole_steps.seconds, measured.flops / measured.seconds)
        video_seconds = full / rates[0] + (video_flops - full) / rates[1]
    return {
        "model": subject.name,
        "mode": mode.name,
        "share": _rounded(measured.share),
        "time_ratio": None if exact is None else _rounded(measured.seconds / exact.seconds),
        "seconds": _rounded(measured.seconds),
        "video_seconds": _rounded(video_seconds),
        "video_seconds_scaled_from": iterations,
        "video_pflops": _rounded(video_flops / 1e15),
        "tflops": _rounded(measured.flops / measured.seconds / 1e12),
        "fraction_of_ceiling": _rounded(measured.flops / measured.seconds / ceiling),
        "peak_gib": _rounded(measured.peak_gib),
        **measured.counts,
        "components": {label: _rounded(seconds) for label, seconds in measured.components.items()},
    }


def whole_row(subject: Subject, mode: Mode, whole: dict[str, Any], exact_seconds: float, ceiling: float) -> dict:
    """The row of a whole video; `seconds` is the mean iteration's."""
    rate = whole["flops"] / whole["seconds"]
    return {
        "model": subject.name,
        "mode": f"{mode.name}, whole video",
        "share": _rounded(whole["share"]),
        "time_ratio": _rounded(whole["seconds"] / exact_seconds),
        "seconds": _rounded(whole["seconds"] / subject.video_iterations),
        "video_seconds": _rounded(whole["seconds"]),
        "video_seconds_scaled_from": None,
        "video_pflops": _rounded(whole["flops"] / 1e15),
        "tflops": _rounded(rate / 1e12),
        "fraction_of_ceiling": _rounded(rate / ceiling),
        "peak_gib": _rounded(whole["peak_gib"]),
    }


def add_ratios(rows: list[dict[str, Any]], model: str, exact: Steady) -> None:
    """Fill in the time ratio of rows that were measured before exact."""
    for row in rows:
        if row["model"] == model and row["time_ratio"] is None:
            row["time_ratio"] = _rounded(row["seconds"] / exact.seconds)


def markdown(data: dict[str, Any]) -> str:
    """The whole result as a page: ceiling, table, seconds by part."""
    rows = data["rows"]
    lines = [f"# {data['device']}", "", f"`{data['command']}` · {data['date']} · commit {data['commit']}", ""]
    lines += [f"Ceiling: {data['ceiling']['matmul_tflops']:.4g} TFLOP/s of bf16 matrix products, measured in this run."]
    lines += ["≈: scaled up from a few iterations.", "", *_table(list(COLUMNS.values()), map(_cells, rows))]
    timed = [row for row in rows if "components" in row]
    lines += ["", "Seconds of one iteration by part, each without the parts inside it:", ""]
    labels = list(dict.fromkeys(label for row in timed for label in row["components"]))
    names = [f"{row['model']} {row['mode']}" for row in timed]
    parts = ([label, *(_text(row["components"].get(label)) for row in timed)] for label in labels)
    return "\n".join([*lines, *_table(["part", *names], parts)]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [_text(row.get(column)) for column in COLUMNS]
    if row["video_seconds_scaled_from"] is not None:
        at = list(COLUMNS).index("video_seconds")
        cells[at] = "≈" + cells[at]
    return cells


def _table(header: list[str], rows: Any) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
