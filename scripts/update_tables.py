"""Write the measured tables into README.md and docs/, between their markers, from the files in results/.

    python scripts/update_tables.py [--check]

What stands from `<!-- table:NAME -->` to `<!-- /table:NAME -->` is replaced. With --check nothing is written, and a
table that is out of date gives exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/overhead.md", "docs/quality.md")
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)


def load(name: str) -> dict:
    """A result file."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(data: dict) -> str:
    """The line under a table that says how to make it again."""
    versions = ", ".join(f"{k} {data['versions'][k]}" for k in ("torch", "diffusers"))
    return f"\n`{data['command']}` · {data['date']} · {data['device']} · {versions}\n"


def quality_summary(name: str) -> str:
    """One line per method that was measured at all target shares of token computations, one column per share."""
    data = load(name)
    rows = [r for r in data["rows"] if r["target_share"]]
    shares = sorted({r["target_share"] for r in rows}, reverse=True)
    by_method: dict[str, dict[float, dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["target_share"]] = row
    whole = {method: of for method, of in by_method.items() if len(of) == len(shares)}
    lines = [[m, *(f"{of[s]['psnr_db']:.1f} / {of[s]['ssim']:.3f}" for s in shares)] for m, of in whole.items()]
    floor = next(r for r in data["rows"] if r["method"] == "exact-bfloat16")
    n = rows[0]["n"]
    note = (
        f"\nPSNR in dB / SSIM against exact execution, mean over {n} prompts. Exact in bfloat16 instead of float32: "
        f"{floor['psnr_db']:.1f} ± {floor['psnr_ci95']:.1f} dB.\n"
    )
    return markdown(["method / distance", *(f"{s:.0%} of tokens" for s in shares)], lines) + note + source(data)


def quality_details(name: str) -> str:
    """Every row with its interval, its real share, and the paired difference from the chunk-level method."""
    data = load(name)
    lines = []
    for r in data["rows"]:
        psnr, ssim = r.get("psnr_db_minus_chunk_level"), r.get("ssim_minus_chunk_level")
        lines.append(
            [
                r["method"],
                f"{r['share']:.3f}",
                f"{r['flops_share']:.3f}",
                f"{r['psnr_db']:.2f} ± {r['psnr_ci95']:.2f}",
                f"{r['ssim']:.4f}",
                f"{psnr[0]:+.2f} ± {psnr[1]:.2f}" if psnr else "",
                f"{ssim[0]:+.4f} ± {ssim[1]:.4f}" if ssim else "",
            ]
        )
    header = ["method / distance", "tokens", "FLOPs", "PSNR, dB", "SSIM", "ΔPSNR to chunk-level", "ΔSSIM"]
    return markdown(header, lines) + source(data)


def fidelity(name: str) -> str:
    """Scores against the true change of residuals."""
    data = load(name)
    columns = ("all", "early", "middle", "late")
    rows = [[r["score"], r["measure"], *(f"{r[c]:.2f}" for c in columns)] for r in data["rows"]]
    return markdown(["ranked by", "measure", "all steps", *columns[1:]], rows) + source(data)


def overhead(name: str) -> str:
    """Wall time against token share, per model."""
    data = load(name)
    rows = [[r["model"], f"{r['share']:.3f}", f"{r['time_ratio']:.3f}"] for r in data["rows"]]
    fits = "".join(
        f"\n{model}: time = {line['intercept']:+.3f} + {line['slope']:.3f} · share"
        for model, line in data["lines"].items()
    )
    header = ["model", "share of tokens", "wall time / exact"]
    return markdown(header, rows) + fits + "\n" + source(data)


TABLES: dict[str, Callable[[], str]] = {
    "tiny-skyreels": lambda: quality_summary("quality-skyreels-tiny"),
    "tiny-skyreels-details": lambda: quality_details("quality-skyreels-tiny"),
    "tiny-skyreels-scores": lambda: fidelity("score-fidelity-skyreels-tiny"),
    "overhead": lambda: overhead("overhead"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
    check = parser.parse_args().check
    old = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if new != text:
            old.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if old:
        print(("out of date: " if check else "updated: ") + ", ".join(old))
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
