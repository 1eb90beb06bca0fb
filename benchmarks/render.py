"""Rows of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import markdown_table
from common.units import scaled

COLUMNS = {
    "method": "method",
    "compute_share": "compute",
    "token_share": "tokens",
    "pflops": "FLOPs",
    "speedup_vs_stock": "vs stock",
    "speedup_vs_exact": "vs exact",
    "latency_s": "latency",
    "kv_bytes": "K/V",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "vbench": "VBench",
    "minus_flowcache": "ΔPSNR to FlowCache",
}
NONE = "–"
METRICS = ("psnr_db", "ssim", "lpips")
FULL, SHORT = 40, 7
"""Letters of a commit, whole and shortened."""


def interval_of(column: str) -> str:
    """Where a row has the half width of a figure's 95 % interval: `psnr_ci95` for `psnr_db`."""
    return f"{column.removesuffix('_db')}_ci95"


def page(data: dict[str, Any]) -> str:
    """The page: a table per model, each with the papers' rows under ours."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["model"] == model]
        quoted = [row for row in data["quoted"] if row["family"] == rows[0]["family"]]
        parts.append(f"## {model}\n\n{model_table(rows, quoted)}\n{notes(rows, quoted)}")
    return "\n".join(parts) + f"\n`{data['command']}` · {data['date']} · {commits(data)}\n"


def commits(data: dict[str, Any]) -> str:
    """The commits that a result's samples were made at, shortened; `-dirty` where files differed from it."""
    found = [data["commit"]] if isinstance(data["commit"], str) else data["commit"]
    short = [commit[:SHORT] + commit[FULL:] for commit in found]
    return f"{'commit' if len(short) == 1 else 'commits'} {', '.join(short)}"


def model_table(rows: Sequence[dict[str, Any]], quoted: Sequence[dict[str, Any]] = ()) -> str:
    """One model's rows as Markdown; columns that are empty throughout are left out."""
    lines = [[cell(row, column) for column in COLUMNS] for row in rows]
    for row in quoted:
        lines.append([cell(row, column) for column in COLUMNS])
        lines[-1][0] = f"*quoted:* {row['method']} ({row['paper'].partition(',')[0]})"
    used = [i for i in range(len(COLUMNS)) if any(line[i] != NONE for line in lines)]
    header = list(COLUMNS.values())
    return markdown_table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def notes(rows: Sequence[dict[str, Any]], quoted: Sequence[dict[str, Any]]) -> str:
    """What the columns of a table mean."""
    compared = [m for m in METRICS if any(row.get(m) is not None for row in (*rows, *quoted))]
    text = (
        f"n = {rows[0]['n']} prompts; ± is the half width of a 95 % interval over them. Compute: share of exact's "
        f"FLOPs; tokens: of its token computations. {', '.join(COLUMNS[m].partition(',')[0] for m in compared)}: "
        "against exact. `@0.4`: threshold chosen, on other prompts, for that share of compute. ΔPSNR: paired per "
        "prompt.\n"
    )
    settings = dict.fromkeys(f"{row['paper']}: {row['setting']}" for row in quoted)
    if settings:
        text += (
            "\nQuoted rows are the papers' own figures, not measured here, their speedup against their vanilla: "
            f"{'; '.join(settings)}.\n"
        )
    return text


def cell(row: dict[str, Any], column: str) -> str:
    """A figure as text, with its interval."""
    value = row.get(column)
    if value is None or (column == "latency_s" and not _timed_with_exact(row)):
        return NONE
    if column == "method":
        return value
    if column == "minus_flowcache":
        return f"{value[0]:+.2f}{_plus_minus(value[1], 2)}"
    if column in ("speedup_vs_stock", "speedup_vs_exact"):
        return f"{value:.2f}×"
    if column == "pflops":
        return scaled(value * 1e15)
    if column == "latency_s":
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    if column == "kv_bytes":
        return f"{scaled(value)}B"
    digits = {"psnr_db": 2, "vbench": 2, "ssim": 4, "lpips": 4}.get(column, 3)
    return f"{value:.{digits}f}{_plus_minus(row.get(interval_of(column)), digits)}"


def _timed_with_exact(row: dict[str, Any]) -> bool:
    """Whether a row's time can be read beside the others'; one of another run met a machine that was busy otherwise."""
    return row.get("speedup_vs_exact", row.get("speedup_vs_stock")) is not None


def _plus_minus(half: float | None, digits: int) -> str:
    return "" if half is None else f" ± {half:.{digits}f}"
