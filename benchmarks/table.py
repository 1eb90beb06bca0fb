"""Samples to a table: means with 95 % intervals and paired differences, the papers' figures beside them.

    python -m benchmarks.table outputs/skyreels outputs/magi --output results/table1-tiny.json

Writes the same rows three times: NAME.json, NAME.csv and NAME.md. All figures are over the prompts and seeds that every
method of a folder has, so a row compares with any other of its model.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.collect import Collection, Facts, collect
from benchmarks.names import BASELINE, preset_of, reading_order, split_name
from benchmarks.quoted import load_quoted
from benchmarks.render import METRICS, interval_of, page
from benchmarks.subject import family_of_settings
from common import metrics
from common.cli import Parser, run_command
from common.compare import EXACT, STOCK
from common.errors import UserError
from common.files import atomic_path, make_output_folder, write_json
from common.results import provenance

DISTANCE = "distance"
"""A setting that is noted of every row: methods of the same name have another one in another folder."""


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % interval; None for a single value."""
    if len(values) == 1:
        return values[0], None
    over = metrics.paired_difference(values, [0.0] * len(values))
    return over.mean, over.half_width


def rows_of(collection: Collection) -> list[dict[str, Any]]:
    """One row per method of a folder (see `row_of`), in reading order."""
    varied = varied_settings(collection)
    rows = []
    for method in sorted(collection.samples, key=reading_order):
        row = row_of(collection, method)
        cache = collection.first(method)["config"].get("cache") or {}
        rows.append({**row, "settings": {name: cache[name] for name in (*varied, DISTANCE) if name in cache}})
    return rows


def row_of(collection: Collection, method: str) -> dict[str, Any]:
    """A method's figures.

    Returns:
        `compute_share` and `token_share`: of exact's FLOPs and token computations, mean over prompts. `pflops` and
        `latency_s`: of one video, mean. Speedups: ratio of the summed seconds of all prompts
        whose two samples are of one run (see `_speedup`). `kv_bytes`: the most
        that any prompt held. `psnr_db`, `ssim`, `lpips`: against exact, with half widths as `psnr_ci95`.
        `minus_flowcache`: mean and half width of the paired difference in PSNR from FlowCache at the same target
        share. `psnr_by_prompt`: in the order of prompts, so that any two rows can be paired. None where a figure does
        not apply.
    """
    stems = collection.stems
    own = [collection.samples[method][stem] for stem in stems]
    exact = [collection.samples[EXACT][stem] for stem in stems]
    row: dict[str, Any] = {
        "model": ", ".join([own[0]["model"], *(f"{name} {value}" for name, value in collection.changes.items())]),
        "method": method,
        "preset": preset_of(method),
        "compute_share": _short(_mean(a["flops"] / b["flops"] for a, b in zip(own, exact, strict=True))),
        "token_share": _short(
            _mean(a["tokens_computed"] / b["tokens_computed"] for a, b in zip(own, exact, strict=True))
        ),
        "pflops": _short(_mean(facts["flops"] for facts in own) / 1e15),
    }
    for metric in METRICS:
        mean, half = _metric(collection, method, metric)
        row |= {metric: mean, interval_of(metric): half}
    return row | {
        "speedup_vs_exact": _speedup(own, exact),
        "speedup_vs_stock": _speedup(own, [collection.samples[STOCK][stem] for stem in stems])
        if STOCK in collection.samples
        else None,
        "latency_s": _short(_mean(facts["seconds"] for facts in own)),
        "kv_bytes": max(facts["peak_bytes"].get("kv", 0) for facts in own) or None,
        "vbench": collection.vbench.get(method, {}).get("total"),
        "minus_flowcache": _minus_flowcache(collection, method),
        "psnr_by_prompt": [_short(scores[stem]["psnr_db"]) for stem in stems]
        if (scores := collection.scores.get(method))
        else None,
        "n": len(stems),
    }


def varied_settings(collection: Collection) -> list[str]:
    """Cache settings, single values only, in which the methods of a folder differ, and what these are counted in."""
    caches = [collection.first(method)["config"].get("cache") or {} for method in collection.samples]
    names = dict.fromkeys(name for cache in caches for name in cache)
    values = {name: [cache[name] for cache in caches if name in cache] for name in names}
    varied = [
        name
        for name, found in values.items()
        if any(value != found[0] for value in found) and not any(isinstance(value, list) for value in found)
    ]
    units = [f"{name}_unit" for name in varied]
    return [*varied, *(name for name in units if name in names and name not in varied)]


def quoted_rows(family: str) -> list[dict[str, Any]]:
    """The papers' rows of a model in the form of ours; their vanilla stands in the place of stock."""
    return [
        {
            **{name: value for name, value in row.items() if name != "speedup"},
            "speedup_vs_stock": row.get("speedup"),
            "family": table.family,
            "paper": table.paper,
            "setting": table.setting,
        }
        for table in load_quoted(family)
        for row in table.rows
    ]


def head(collections: Sequence[Collection], command: str) -> dict[str, Any]:
    """Where the samples came from. What differs between samples is listed, not averaged away."""
    samples = [facts for c in collections for of in c.samples.values() for facts in of.values()]

    def all_of(key: str) -> Any:
        distinct = list({repr(facts[key]): facts[key] for facts in samples}.values())
        return distinct[0] if len(distinct) == 1 else distinct

    sampling = [collection.command for collection in collections]
    return {
        **provenance(command),
        "sampling": sampling,
        **{key: all_of(key) for key in ("commit", "versions", "device", "threads")},
    }


def write_csv(path: Path, data: dict[str, Any]) -> None:
    """All rows, ours and quoted ones, told apart by the column `source`."""
    rows = [{"source": "measured", **row} for row in data["rows"]]
    rows += [{"source": f"quoted: {row['paper']}", "model": row["family"], **row} for row in data["quoted"]]
    for row in rows:
        mean, half = row.pop("minus_flowcache", None) or (None, None)
        row |= {"minus_flowcache": mean, "minus_flowcache_ci95": half}
        for several in ("settings", "psnr_by_prompt"):
            row.pop(several, None)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_table(folders: Sequence[Path], output: Path, command: str, partial: bool = False) -> None:
    """Write `output` and the same with suffixes `.csv` and `.md`.

    Raises:
        UserError: a folder is unfinished or unscored (see `collect`), or the output is not named `.json`.
    """
    if output.suffix != ".json":
        raise UserError(f"--output {str(output)!r} is not allowed; give a name that ends in .json")
    make_output_folder(output.parent)
    collections = [collect(folder, partial) for folder in folders]
    rows, quoted = [], {}
    for collection in collections:
        family = family_of_settings(collection.first(EXACT)["config"])
        if family is None:
            raise UserError(
                f"samples in {str(collection.folder.root)!r} have settings of no known model; make them again"
            )
        rows += [{"family": family, **row} for row in rows_of(collection)]
        quoted[family] = quoted_rows(family)
    data = {
        **head(collections, command),
        "rows": rows,
        "quoted": [row for of in quoted.values() for row in of],
    }
    write_json(output, data)
    write_csv(output.with_suffix(".csv"), data)
    with atomic_path(output.with_suffix(".md")) as file:
        file.write_text(page(data), encoding="utf-8")


def _metric(collection: Collection, method: str, metric: str) -> tuple[float | None, float | None]:
    scores = collection.scores.get(method)
    if scores is None:
        return None, None
    values = [scores[stem][metric] for stem in collection.stems]
    if any(value is None for value in values):
        return None, None
    mean, half = mean_interval(values)
    return _short(mean), _short(half)


def _minus_flowcache(collection: Collection, method: str) -> list[float | None] | None:
    kind, share = split_name(method)
    others = (name for name in collection.samples if split_name(name) == (BASELINE, share))
    baseline = next(others, None) if share is not None and kind != BASELINE else None
    if baseline is None:
        return None
    ours, theirs = ([collection.scores[m][stem]["psnr_db"] for stem in collection.stems] for m in (method, baseline))
    return [_short(value) for value in mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])]


def _speedup(own: Iterable[Facts], reference: Iterable[Facts]) -> float | None:
    """Of the prompts that one process made both ways in one run: at another time the machine may be busier."""
    pairs = [(a["seconds"], b["seconds"]) for a, b in zip(own, reference, strict=True) if a["run"] == b["run"]]
    return _short(sum(b for _, b in pairs) / sum(a for a, _ in pairs)) if pairs else None


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    parser = Parser.of_module("benchmarks.table", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the --output of benchmarks.sample")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="NAME.json", help="file to write; .csv and .md go beside it"
    )
    parser.add_argument("--partial", action="store_true", help="go on with the prompts that all methods have")
    args = parser.parse_args(arguments)
    make_table(args.folders, args.output, shlex.join(["python", "-m", "benchmarks.table", *arguments]), args.partial)


if __name__ == "__main__":
    sys.exit(main())
