"""The result as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = {
    "model": "model",
    "mode": "mode",
    "share": "share of tokens",
    "time_ratio": "time / exact",
    "times_stock": "× stock",
    "seconds": "s / iteration",
    "video_seconds": "video s",
    "video_pflops": "video PFLOP",
    "tflops": "TFLOP/s",
    "fraction_of_ceiling": "of ceiling",
    "peak_gib": "peak GiB",
    "fits": "in 24 GiB",
    "host_reads": "host reads",
    "syncs": "syncs",
    "loop_syncs": "loop syncs",
    "launches": "launches",
    "gpu_busy": "GPU busy",
    "attention": "attention",
    "graphs": "graphs",
    "warmup_seconds": "warm-up s",
}
KERNELS_OF = ("exact", "paper")
"""Modes whose kernels the page shows, by how their names begin; the JSON has all."""
LONGEST_NAME = 90


def markdown(data: dict[str, Any]) -> str:
    """Checks, ceilings, table, what is missing, seconds by part, kernels."""
    rows = data["rows"]
    lines = [f"# {data['device']}", "", f"`{data['command']}` · {data['date']} · commit {data['commit']}", ""]
    lines += [*_failures(data), *_checks(data["checks"]), *_ceilings(data)]
    lines += ["≈: scaled up from a few iterations.", "", *_table(list(COLUMNS.values()), map(_cells, rows)), ""]
    timed = [row for row in rows if "components" in row]
    if timed:
        lines += ["Seconds of one iteration by part, each without the parts inside it:", ""]
        labels = list(dict.fromkeys(label for row in timed for label in row["components"]))
        parts = ([r["model"], r["mode"], *(_text(r["components"].get(label)) for label in labels)] for r in timed)
        lines += [*_table(["model", "mode", *labels], parts), ""]
    for row in timed:
        if row["kernels"] and row["mode"].startswith(KERNELS_OF):
            lines += _kernels(row)
    return "\n".join(lines)


def _failures(data: dict[str, Any]) -> list[str]:
    lines = [f"- **failed**: {f['model']} {f['what']}: `{f['error'].replace('`', chr(39))}`" for f in data["failed"]]
    lines += [f"- not begun within {data['time_limit']:g} s: {m['model']} {m['mode']}" for m in data["missing"]]
    return [*lines, ""] if lines else []


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    cells = (
        [c["model"], c["check"], f"{c['difference']:.2g}", f"{c['tolerance']:g}", "yes" if c["passed"] else "**no**"]
        for c in checks
    )
    header = ["model", "check, tiny size", "largest difference / largest value", "allowed", "passed"]
    return [*_table(header, cells), ""] if checks else []


def _ceilings(data: dict[str, Any]) -> list[str]:
    products = data["ceiling"]["matmul_tflops"]
    lines = [f"Ceiling: {products:.4g} TFLOP/s of bf16 matrix products, measured in this run."]
    for name, model in data["models"].items():
        cost = model["exact_iteration"]
        told = f"{name}: an exact iteration has {cost['attention_pflops']:.4g} PFLOP in self-attention and "
        told += f"{cost['other_pflops']:.4g} in other products"
        if cost["seconds_at_ceilings"] is not None:
            told += f", {cost['seconds_at_ceilings']:.4g} s at the rates of their kernels"
        lines += ["", f"{told}. Attention ran with: {model['attention']}."]
    header = ["model", "kernel", "K/V in memory", "queries", "keys", "TFLOP/s"]
    rates = (
        [name, r["kernel"], r["layout"], str(r["queries"]), str(r["keys"]), _text(r.get("tflops", r.get("error")))]
        for name, model in data["models"].items()
        for r in model["attention_rates"]
    )
    return [*lines, "", *_table(header, rates), ""]


def _kernels(row: dict[str, Any]) -> list[str]:
    shares = ([_escaped(name), str(n), _text(t), f"{t / row['seconds']:.1%}"] for name, n, t in row["kernels"])
    title = f"{row['model']} {row['mode']}: the kernels with the most time in one iteration"
    return [
        f"{title}; GPU busy {row['gpu_busy']:.0%} of it.",
        "",
        *_table(["kernel", "calls", "s", "of it"], shares),
        "",
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [_text(row.get(column)) for column in COLUMNS]
    if row["video_seconds_scaled_from"] is not None and row["video_seconds"] is not None:
        at = list(COLUMNS).index("video_seconds")
        cells[at] = "≈" + cells[at]
    return cells


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(name: str) -> str:
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return "`" + short.replace("|", "\\|").replace("`", "'") + "`"


def _text(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
