"""Write the measured tables into README.md and docs/, between their markers, from the files in results/.

    python scripts/update_tables.py [--check]

What stands from `<!-- table:NAME -->` to `<!-- /table:NAME -->` is replaced. With --check nothing is written, and a
table that is out of date gives exit code 1. A table whose measurement has not been made says which command makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.names import BASELINE, split_name
from benchmarks.quoted import load_quoted
from benchmarks.render import cell, model_table, notes
from common.metrics import paired_difference

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)
KINDS = {
    "teacache-matched": "TeaCache",
    "flowcache-modulation": "FlowCache, published distance",
    BASELINE: "FlowCache",
    "flowcache-table": "FlowCache, measured distance",
    "motioncache-matched": "MotionCache",
    "best-matched": "best (ours)",
}
METHODS = {"vanilla": "vanilla", "teacache": "TeaCache", "flowcache": "FlowCache", "motioncache": "MotionCache"}
PARTS = ("all", "early", "middle", "late")
Data = dict[str, Any]


def source(data: Data) -> str:
    """The line under a table that says how to make it again."""
    versions = ", ".join(f"{k} {data['versions'][k]}" for k in ("torch", "diffusers"))
    return f"\n`{data['command']}` · {data['date']} · {data['device']} · {versions}\n"


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


def ablation(data: Data) -> str:
    """Every row of both models but exact's."""
    rows = [row for row in data["rows"] if row["psnr_db"] is not None]
    columns = ("model", "method", "compute_share", "psnr_db", "ssim", "kv_bytes", "minus_flowcache")
    header = ["model", "method", "compute", "PSNR, dB", "SSIM", "K/V", "ΔPSNR to FlowCache"]
    lines = [[row["model"], *(cell(row, column) for column in columns[1:])] for row in rows]
    return markdown_table(header, lines) + source(data)


def differences(data: Data) -> str:
    """`best` against chunk-level caching, at the same share of compute and at more, paired per prompt."""
    found = {(row["model"], *split_name(row["method"])): row for row in data["rows"]}
    lines = []
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        shares = sorted({share for name, _, share in found if name == model and share}, reverse=True)
        kinds = dict.fromkeys(kind for name, kind, share in found if name == model and kind.startswith("flowcache-"))
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


def floor(data: Data) -> str:
    """What rounding alone does to each model's videos."""
    rows = [row for row in data["rows"] if row["method"] == "exact-bfloat16"]
    lines = [[row["model"], cell(row, "psnr_db"), cell(row, "ssim"), str(row["n"])] for row in rows]
    return markdown_table(["model", "PSNR of exact in bfloat16, dB", "SSIM", "prompts"], lines) + source(data)


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
    """Wall time against token share, per model."""
    rows = [[r["model"], f"{r['share']:.3f}", f"{r['time_ratio']:.3f}"] for r in data["rows"]]
    fits = "".join(
        f"\n{model}: time = {line['intercept']:+.3f} + {line['slope']:.3f} · share"
        for model, line in data["lines"].items()
    )
    return markdown_table(["model", "share of tokens", "wall time / exact"], rows) + fits + "\n" + source(data)


BEST = "python -m benchmarks.table OUT OUT2 --output results/best-tiny.json"
REPRODUCE = "bash scripts/reproduce_table1.sh --tiny"
FIDELITY = "python -m benchmarks.score_fidelity --config configs/{0}_slow.yaml --output results/score-fidelity-{1}.json"
ABLATIONS = ("alpha", "chunk-phase", "threshold", "distance", "reuse", "vote", "score", "kv")
MEASURED: dict[str, tuple[str, Callable[[Data], str], str]] = {
    "quality": ("best-tiny", summary, BEST),
    "quality-skyreels": ("best-tiny", partial(comparison, "skyreels-v2-tiny"), BEST),
    "quality-magi": ("best-tiny", partial(comparison, "magi1-tiny"), BEST),
    "differences": ("best-tiny", differences, BEST),
    "parts": ("parts-tiny", ablation, "python -m benchmarks.table OUT OUT2 --output results/parts-tiny.json"),
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
} | {
    f"ablation-{name}": (f"ablation-{name}-tiny", ablation, f"python -m benchmarks.table OUT [OUT2] --output …{name}…")
    for name in ABLATIONS
}
"""By name of a table: the result file, what to make of it, and the command that makes the file."""
QUOTED = {"quoted-skyreels": "SkyReels-V2", "quoted-magi": "MAGI-1"}


def table(name: str) -> str:
    """What stands between the markers of a name."""
    if name in QUOTED:
        return quoted(QUOTED[name])
    file, draw, command = MEASURED[name]
    path = ROOT / "results" / f"{file}.json"
    if not path.is_file():
        return f"Not measured yet; the command is `{command}`.\n"
    return draw(json.loads(path.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
    check = parser.parse_args().check
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
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
