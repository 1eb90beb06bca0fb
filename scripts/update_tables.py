"""Write the measured tables into README.md and docs/, between their markers, from the files in results/.

    python scripts/update_tables.py [--check]

What stands from `<!-- table:NAME -->` to `<!-- /table:NAME -->` is replaced. With --check nothing is written, and a
table that is out of date gives exit code 1. A table whose measurement has not been made says which command makes it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.names import BASELINE, split_name
from benchmarks.quoted import load_quoted
from benchmarks.render import cell, commits, model_table, notes
from common.checks import near_miss
from common.cli import Parser, run_command
from common.errors import UserError
from common.metrics import paired_difference
from common.units import scaled

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)
KINDS = {
    "teacache-matched": "TeaCache",
    "teacache-table": "TeaCache, measured distance",
    "flowcache-modulation": "FlowCache, published distance",
    BASELINE: "FlowCache",
    "flowcache-table": "FlowCache, measured distance",
    "motioncache-matched": "MotionCache",
    "motioncache-shared": "MotionCache, shared selection",
    "best-matched": "best (ours)",
}
ELSEWHERE = {
    "teacache-matched": "TeaCache",
    BASELINE: "FlowCache",
    "motioncache-matched": "MotionCache",
    "motioncache-shared": "MotionCache, shared",
    "best-matched": "best",
}
ROUNDED = {"exact-bfloat16": "everything, to bfloat16", "kv-int8": "K/V, to 8 bits"}
METHODS = {"vanilla": "vanilla", "teacache": "TeaCache", "flowcache": "FlowCache", "motioncache": "MotionCache"}
PARTS = ("all", "early", "middle", "late")
Data = dict[str, Any]


def source(data: Data) -> str:
    """The line under a table that says how to make it again."""
    versions = ", ".join(f"{k} {data['versions'][k]}" for k in ("torch", "diffusers"))
    return f"\n`{data['command']}` · {data['date']} · {data['device']} · {versions} · {commits(data)}\n"


def summary(data: Data) -> str:
    """One line per model and method, one column per share of compute that was aimed at."""
    shares = sorted({share for row in data["rows"] if (share := split_name(row["method"])[1])}, reverse=True)
    found = {(row["model"], *split_name(row["method"])): row for row in data["rows"]}
    lines = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        for kind, name in KINDS.items():
            rows = [found.get((model, kind, share)) for share in shares]
            if not any(rows):
                continue
            lines.append([model, name, *(f"{r['psnr_db']:.1f} / {r['ssim']:.3f}" if r else "–" for r in rows)])
    note = f"\nPSNR in dB / SSIM against exact execution, mean over {data['rows'][0]['n']} prompts.\n"
    return markdown_table(["model", "method", *(f"{s:.0%} of FLOPs" for s in shares)], lines) + note + source(data)


def comparison(model: str, data: Data) -> str:
    """Every row of a model, with what the columns mean."""
    rows = [row for row in data["rows"] if row["model"] == model]
    return f"{model_table(rows)}\n{notes(rows, [])}{source(data)}"


def quality(model: str, data: Data) -> str:
    """The same without times, where samples are made beside other work."""
    untimed = [{**row, "speedup_vs_exact": None, "speedup_vs_stock": None} for row in data["rows"]]
    return comparison(model, {**data, "rows": untimed})


def ablation(data: Data) -> str:
    """Every row of both models but exact's."""
    rows = [row for row in data["rows"] if row["psnr_db"] is not None]
    columns = ("model", "method", "compute_share", "psnr_db", "ssim", "kv_bytes", "minus_flowcache")
    header = ["model", "method", "compute", "PSNR, dB", "SSIM", "K/V", "ΔPSNR to FlowCache"]
    lines = [[row["model"], *(cell(row, column) for column in columns[1:])] for row in rows]
    return markdown_table(header, lines) + source(data)


def differences(data: Data) -> str:
    """`best` against all other methods, at the same share of compute and at more, paired per prompt."""
    found = {(row["model"], *split_name(row["method"])): row for row in data["rows"]}
    lines = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        shares = sorted({share for name, _, share in found if name == model and share}, reverse=True)
        kinds = dict.fromkeys(kind for name, kind, share in found if name == model and share and kind != "best-matched")
        for ours in shares:
            best = found.get((model, "best-matched", ours))
            if best is None:
                continue
            for kind in kinds:
                for theirs in shares:
                    row = found.get((model, kind, theirs))
                    if row is None or theirs < ours:
                        continue
                    gain = paired_difference(best["psnr_by_prompt"], row["psnr_by_prompt"])
                    cells = [model, best["method"], row["method"], f"{gain.mean:+.2f} ± {gain.half_width:.2f} dB"]
                    lines.append(cells)
    return markdown_table(["model", "method", "against", "ΔPSNR"], lines) + source(data)


def parts(data: Data) -> str:
    """Every cached row of both models, with its difference from `best` at the same share, paired per prompt."""
    lines = []
    for row in data["rows"]:
        if row["psnr_db"] is None:
            continue
        own = [row["model"], row["method"], *(cell(row, column) for column in ("compute_share", "psnr_db", "ssim"))]
        best = next(
            r for r in data["rows"] if r["model"] == row["model"] and split_name(r["method"])[0] == "best-matched"
        )
        loss = paired_difference(row["psnr_by_prompt"], best["psnr_by_prompt"])
        lines.append([*own, "–" if row is best else f"{loss.mean:+.2f} ± {loss.half_width:.2f}"])
    return markdown_table(["model", "method", "compute", "PSNR, dB", "SSIM", "ΔPSNR to best"], lines) + source(data)


def elsewhere(data: Data) -> str:
    """One line per model and settings: PSNR and compute of each method, and two differences, paired per prompt."""
    found = {(row["model"], split_name(row["method"])[0]): row for row in data["rows"]}
    lines = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        rows = {kind: found.get((model, kind)) for kind in ELSEWHERE}
        cells = [f"{r['psnr_db']:.1f} ({r['compute_share']:.0%})" if r else "–" for r in rows.values()]
        for kind, other in (("best-matched", "teacache-matched"), ("motioncache-shared", "motioncache-matched")):
            ours, theirs = rows[kind], rows[other]
            if ours is None or theirs is None:
                cells.append("–")
                continue
            gain = paired_difference(ours["psnr_by_prompt"], theirs["psnr_by_prompt"])
            cells.append(f"{gain.mean:+.1f} ± {gain.half_width:.1f}")
        lines.append([model, *cells])
    header = ["model, settings", *ELSEWHERE.values(), "best − TeaCache", "shared − MotionCache"]
    note = f"\nPSNR in dB (share of exact's FLOPs), mean over {data['rows'][0]['n']} prompts.\n"
    return markdown_table(header, lines) + note + source(data)


def floor(data: Data) -> str:
    """What rounding alone does to each model's videos."""
    rows = [(ROUNDED[row["method"]], row) for row in data["rows"] if row["method"] in ROUNDED]
    lines = [[row["model"], what, cell(row, "psnr_db"), cell(row, "ssim"), str(row["n"])] for what, row in rows]
    return markdown_table(["model", "rounded", "PSNR, dB", "SSIM", "prompts"], lines) + source(data)


def quoted(family: str) -> str:
    """What the MotionCache paper reports of a model, slow and fast in one line."""
    table = next(table for table in load_quoted(family) if table.paper.startswith("MotionCache"))
    forms = {
        "pflops": "{:g}",
        "speedup": "{:.2f}×",
        "latency_s": "{:g} s",
        "vbench": "{:.2f}",
        "psnr_db": "{:.2f}",
        "ssim": "{:.4f}",
        "lpips": "{:.4f}",
    }
    lines = []
    for key, name in METHODS.items():
        rows = [row for row in table.rows if row["method"].partition("-")[0] == key]
        cells = [" / ".join(form.format(row[c]) for row in rows if c in row) for c, form in forms.items()]
        lines.append([name + (" slow / fast" if len(rows) > 1 else ""), *cells])
    return markdown_table(["method", "PFLOPs", "speedup", "latency", "VBench", "PSNR", "SSIM", "LPIPS"], lines)


def fidelity(data: Data) -> str:
    """Scores against the true change of residuals."""
    rows = []
    for row in data["rows"]:
        published = " (published)" if row["score"] == data["published"] else ""
        rows.append(
            [row["score"] + published, row["measure"], *("–" if row[p] is None else f"{row[p]:.2f}" for p in PARTS)]
        )
    spread = data["tokens"]
    tenth = spread["top"].index(0.1)
    top = ", ".join(f"{spread[part][tenth]:.0%} {part}" for part in PARTS[1:])
    note = f"\nPart of the squared change that lies in the top tenth of the tokens: {top}.\n"
    return markdown_table(["ranked by", "measure", "all steps", *PARTS[1:]], rows) + note + source(data)


def paper_flops(data: Data) -> str:
    """PFLOPs of the papers' videos: theirs, and ours with the tiny models' decisions."""
    header = ["model", "paper", "method", "quoted", "vanilla", "exact", "our decisions", "on a dense model"]
    header += ["share that the quote implies", "share decided"]
    lines = [
        [
            *(row["model"], row["paper"], row["method"], f"{row['quoted_pflops']:g}"),
            *(f"{row[key]:.1f}" for key in ("vanilla_pflops", "exact_pflops", "replayed_pflops")),
            "–" if row["dense_pflops"] is None else f"{row['dense_pflops']:.1f}",
            *(f"{row[key]:.2f}" for key in ("implied_share", "recorded_share")),
        ]
        for row in data["rows"]
    ]
    return markdown_table(header, lines) + source(data)


def overhead(data: Data) -> str:
    """Wall time against the share of compute, for each model, number of threads and form."""
    names = ("share", "flops_share", "time_ratio")
    rows = [[r["model"], str(r["threads"]), r["form"], *(f"{r[name]:.3f}" for name in names)] for r in data["rows"]]
    header = ["model", "threads", "form", "share of tokens", "of FLOPs", "wall time / exact"]
    fits = [
        [line["model"], str(line["threads"]), line["form"], f"{line['intercept']:+.3f} + {line['slope']:.3f} · share"]
        for line in data["lines"]
    ]
    lines = markdown_table(["model", "threads", "form", "line through its points"], fits)
    return f"{markdown_table(header, rows)}\n{lines}{source(data)}"


def long_video(data: Data) -> str:
    """PSNR over the chunks of a long video: its first window, and the two halves of the rest."""
    first, chunks = data["first_window"], data["chunks"]
    edges = [0, first, (first + chunks) // 2, chunks]
    parts = [range(*pair) for pair in pairwise(edges)]
    header = [
        "method",
        "made from",
        "compute",
        *(f"chunks {p.start + 1}–{p.stop}" for p in parts),
        "later half − earlier",
    ]
    lines = []
    for row in data["rows"]:
        means = [sum(row["psnr_db"][chunk] for chunk in part) / len(part) for part in parts]
        half = "" if row["drift_ci95"] is None else f" ± {row['drift_ci95']:.2f}"
        history = {"own": "its own history", "exact": "exact's history"}.get(row["history"], "first window, then exact")
        cells = [row["method"], history, cell(row, "compute_share"), *(f"{mean:.2f}" for mean in means)]
        lines.append([*cells, f"{row['drift_db']:+.2f}{half}"])
    note = f"\nPSNR in dB against exact, mean over chunks and {data['rows'][0]['n']} prompts.\n"
    return markdown_table(header, lines) + note + source(data)


def kv_memory(data: Data) -> str:
    """Peaks of memory over the length of a video."""
    lengths = list(dict.fromkeys(row["chunks"] for row in data["rows"]))
    by_way: dict[tuple[str, str], list[Data]] = {}
    for row in data["rows"]:
        by_way.setdefault((row["model"], row["way"]), []).append(row)
    lines = []
    for (model, way), rows in by_way.items():
        psnr = " / ".join("–" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}" for row in rows)
        values = " / ".join(f"{scaled(row['values_bytes'])}B" for row in rows)
        lines.append([model, way, *(f"{scaled(row['kv_bytes'])}B" for row in rows), values, psnr])
    header = ["model", "K/V", *(f"{n} chunks" for n in lengths), "reused values", "PSNR to all kept, dB"]
    return markdown_table(header, lines) + source(data)


def memory(data: Data) -> str:
    """Peak memory and what an iteration asks of the host, counted without a GPU."""
    lines = []
    for row in data["rows"]:
        sizes = [f"{row[f'{part}_bytes'] / 2**30:.1f}" for part in ("peak", "weights", "kv", "values", "rest")]
        counts = [str(row[key]) for key in ("waits", "loop_waits", "kernels")]
        traffic = (f"{row['moved_bytes'] / 1e9:.0f}", f"{row['copied_bytes'] / 1e9:.1f}")
        lines.append([row["model"], row["mode"], *sizes, *counts, *traffic])
    header = ["model", "mode", "peak GiB", "weights", "K/V", "cached values", "rest"]
    header += ["waits in forwards", "in the loop", "kernels", "moved GB", "copied GB"]
    return markdown_table(header, lines) + "\nCounted, not measured.\n" + source(data)


BEST = "python -m benchmarks.table OUT OUT2 --output results/best-tiny.json"
QUALITY = "python -m benchmarks.table OUT OUT2 --output results/quality-tiny.json"
LONG = (
    "python -m benchmarks.long_video configs/experiments/best_{0}_tiny.yaml "
    "--methods best-matched@0.3 flowcache-matched@0.3 --chunks {2} --output results/long-video-{1}-tiny.json"
)
MEMORY = (
    "python -m benchmarks.kv_memory --config configs/skyreels_v2_tiny_best.yaml configs/magi1_tiny_best.yaml "
    "--output results/kv-memory-tiny.json"
)
REPRODUCE = "bash scripts/reproduce_table1.sh --tiny"
FIDELITY = "python -m benchmarks.score_fidelity --config configs/{0}_slow.yaml --output results/score-fidelity-{1}.json"
ABLATIONS = ("alpha", "chunk-phase", "threshold", "distance", "reuse", "vote", "score", "kv")
MEASURED: dict[str, tuple[str, Callable[[Data], str], str]] = {
    "quality": ("quality-tiny", summary, QUALITY),
    "quality-skyreels": ("quality-tiny", partial(quality, "skyreels-v2-tiny"), QUALITY),
    "quality-magi": ("quality-tiny", partial(quality, "magi1-tiny"), QUALITY),
    "differences": ("best-tiny", differences, BEST),
    "parts": ("parts-tiny", parts, "python -m benchmarks.table OUT OUT2 --output results/parts-tiny.json"),
    "elsewhere": ("elsewhere-tiny", elsewhere, "python -m benchmarks.table OUT … --output results/elsewhere-tiny.json"),
    "floor": ("floor-tiny", floor, "python -m benchmarks.table OUT OUT2 --output results/floor-tiny.json"),
    "table1-skyreels": ("table1-tiny", partial(comparison, "skyreels-v2-tiny"), REPRODUCE),
    "table1-magi": ("table1-tiny", partial(comparison, "magi1-tiny"), REPRODUCE),
    "scores-skyreels": (
        "score-fidelity-skyreels-tiny",
        fidelity,
        FIDELITY.format("skyreels_v2_tiny", "skyreels-tiny"),
    ),
    "scores-magi": ("score-fidelity-magi-tiny", fidelity, FIDELITY.format("magi1_tiny", "magi-tiny")),
    "paper-flops": ("paper-flops", paper_flops, "python -m benchmarks.paper_flops OUT [OUT2]"),
    "overhead": ("overhead", overhead, "python -m benchmarks.overhead"),
    "long-video-skyreels": ("long-video-skyreels-tiny", long_video, LONG.format("skyreels_v2", "skyreels", 28)),
    "long-video-magi": ("long-video-magi-tiny", long_video, LONG.format("magi1", "magi", 24)),
    "kv-memory": ("kv-memory-tiny", kv_memory, MEMORY),
    "memory": ("memory", memory, "python -m benchmarks.memory"),
} | {
    f"ablation-{name}": (f"ablation-{name}-tiny", ablation, f"python -m benchmarks.table OUT [OUT2] --output …{name}…")
    for name in ABLATIONS
}
"""By name of a table: the result file, what to make of it, and the command that makes the file."""
QUOTED = {"quoted-skyreels": "SkyReels-V2", "quoted-magi": "MAGI-1"}


def table(name: str) -> str:
    """What stands between the markers of a name.

    Raises:
        UserError: there is no table of that name, or its result file is damaged or of another kind.
    """
    if name in QUOTED:
        return quoted(QUOTED[name])
    if name not in MEASURED:
        raise UserError(f"unknown table {name!r} between markers; {near_miss(name, [*QUOTED, *MEASURED])}")
    file, draw, command = MEASURED[name]
    path = ROOT / "results" / f"{file}.json"
    if not path.is_file():
        return f"Not measured yet; the command is `{command}`.\n"
    try:
        return draw(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"{str(path)!r} is damaged or of another kind ({type(error).__name__}: {error}), and the table {name!r} "
            f"needs it; make it again: {command}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if --check finds a table that is out of date."""
    stale: list[str] = []
    code = run_command(lambda: stale.extend(_run(argv)))
    return code or (1 if stale else 0)


def _run(argv: Sequence[str] | None) -> list[str]:
    """All of it; the documents that were left out of date."""
    parser = Parser("python scripts/update_tables.py", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table differs")
    check = parser.parse_args(argv).check
    old = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = MARKED.sub(lambda m: m[1] + table(m[2]) + m[3], text)
        if new != text:
            old.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    if old:
        print(("out of date: " if check else "updated: ") + ", ".join(old))
    return old if check else []


if __name__ == "__main__":
    sys.exit(main())
