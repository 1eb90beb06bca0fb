"""Decision schedules of the tiny models, costed at the papers' sizes, beside the FLOPs that the papers quote.

    python -m benchmarks.paper_flops outputs/table1/skyreels_v2_tiny outputs/table1/magi1_tiny

Takes, from folders of samples, the methods that the papers have too, the share of tokens that each step of each chunk
computed, and counts the FLOPs of the papers' videos with the same shares.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_scale import PaperScale, StepShares, magi_scale, skyreels_scale
from benchmarks.quoted import load_quoted
from benchmarks.samples import TRACE, SampleFolder, open_samples
from benchmarks.subject import family_of_settings
from common.cache import Trace
from common.cli import Parser, run_command
from common.errors import UserError
from common.files import make_output_folder, write_json
from common.results import provenance

ROOT = Path(__file__).resolve().parents[1]
PETA = 1e15
SCALES = {
    ("SkyReels-V2", "MotionCache"): skyreels_scale,
    ("SkyReels-V2", "FlowCache"): skyreels_scale,
    ("MAGI-1", "MotionCache"): lambda: magi_scale(168, (5, 4, 3, 2)),
    ("MAGI-1", "FlowCache"): lambda: magi_scale(240, ()),
}
"""The video of each paper's table, by model and paper."""


def whole_iterations(traces: Sequence[Trace]) -> float:
    """Share of iterations at which every active chunk was computed whole: what a model that always runs all chunks
    would have computed of its forwards with the same decisions."""
    whole: dict[tuple[int, int, int], bool] = {}
    for number, trace in enumerate(traces):
        for record in trace.records:
            if record.role == "denoise":
                key = (number, record.window, record.iteration)
                whole[key] = whole.get(key, True) and record.decision == "full"
    return sum(whole.values()) / len(whole)


def rows_of(family: str, recorded: dict[str, list[Trace]]) -> list[dict[str, Any]]:
    """A row for each method that both a paper and the records have.

    Args:
        family: model, as in `benchmarks.subject.FAMILIES`.
        recorded: traces by method.

    Returns:
        PFLOPs: `quoted` by the paper; `vanilla` and `exact` by our count of its video; `replayed` with the tiny
        model's decisions; `dense`, for TeaCache, with them on a model that runs all chunks at each iteration. Shares of
        the denoising that is computed: `implied` by the paper's figure if it counts as exact does; `recorded` on the
        tiny model and brought to the paper's size.
    """
    rows = []
    for table in load_quoted(family):
        paper = table.paper.partition(",")[0]
        scale = SCALES[family, paper]()
        for quoted in table.rows:
            if quoted["method"] in recorded:
                rows.append({"model": family, "paper": paper, **_row(quoted, recorded[quoted["method"]], scale)})
    return rows


def _row(quoted: dict[str, Any], traces: Sequence[Trace], scale: PaperScale) -> dict[str, Any]:
    method, replayed = quoted["method"], scale.replayed(StepShares.of(traces))
    joint = method.startswith("teacache")
    return {
        "method": method,
        "quoted_pflops": quoted["pflops"],
        "vanilla_pflops": round(scale.vanilla / PETA, 1),
        "exact_pflops": round(scale.exact / PETA, 1),
        "replayed_pflops": round(replayed / PETA, 1),
        "dense_pflops": round(whole_iterations(traces) * scale.vanilla / PETA, 1) if joint else None,
        "implied_share": round(scale.implied_share(quoted["pflops"] * PETA), 3),
        "recorded_share": round(scale.implied_share(replayed), 3),
    }


def record_of(folder: SampleFolder) -> tuple[str | None, dict[str, list[Trace]]]:
    """The model of a folder's samples, and their traces by method.

    Raises:
        UserError: a sample is not whole.
    """
    family, traces = None, {}
    for method in folder.methods():
        for stem in folder.stems(method):
            path = folder.file(method, stem, TRACE)
            if path.is_file():
                summary = folder.summary(method, stem)
                if summary is None:
                    raise UserError(
                        f"sample {method}/{stem} in {str(folder.root)!r} is not whole; go on with benchmarks.sample"
                    )
                family = family_of_settings(summary["config"])
                traces.setdefault(method, []).append(Trace.from_dict(json.loads(path.read_text(encoding="utf-8"))))
    return family, traces


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    parser = Parser.of_module("benchmarks.paper_flops", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the --output of benchmarks.sample")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "results/paper-flops.json",
        metavar="NAME.json",
        help="file to write (results/paper-flops.json)",
    )
    args = parser.parse_args(arguments)
    make_output_folder(args.output.parent)
    rows = []
    for root in args.folders:
        family, recorded = record_of(open_samples(root))
        found = rows_of(family, recorded) if family else []
        if not found:
            raise UserError(f"{str(root)!r} holds no method that the papers report; sample a table1_* experiment there")
        rows += found
    command = shlex.join(["python", "-m", "benchmarks.paper_flops", *arguments])
    write_json(args.output, {**provenance(command), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
