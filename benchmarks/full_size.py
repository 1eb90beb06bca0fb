"""Speed of the real architectures on one GPU, with random weights.

    python -m benchmarks.full_size

SkyReels-V2 1.3B at 544×960 and MAGI-1 4.5B at 720×720: the library's own forward, exact, and cached at several shares
of tokens, a few iterations each in which all chunks are active. Writes `results/gpu/<device>.json` and the same as a
Markdown page, after each row. `docs/speed.md` says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.instruments import Clock, attention_rate, matmul_ceiling
from benchmarks.speed.magi import Magi
from benchmarks.speed.measure import Steady, measure_steady, measure_whole
from benchmarks.speed.replay import Schedule
from benchmarks.speed.skyreels import SkyReels
from benchmarks.speed.subject import WARMUP_STEPS, Mode, Subject, paper_share
from benchmarks.speed.table import add_ratios, markdown, steady_row, whole_row
from common.cache import MotionCacheConfig
from common.checks import check_range
from common.cli import Parser, count, number, run_command
from common.devices import resolve_device
from common.files import atomic_path, make_output_folder, write_json
from common.results import provenance

logger = logging.getLogger("full_size")
ROOT = Path(__file__).resolve().parents[1]
SUBJECTS: dict[str, Callable[[str, torch.device], Subject]] = {"skyreels": SkyReels, "magi": Magi}
SHARES = (0.2, 0.4, 0.6, 0.8)
STOCK_ITERATIONS = 2
MATMUL_SIZE = {"full": 8192, "tiny": 256}


class Report:
    """The result files, written anew with each row, so that a run that is cut off leaves what it measured."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data
        self.rows: list[dict[str, Any]] = data["rows"]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        logger.info("%s %s: %.4g s per iteration", row["model"], row["mode"], row["seconds"])
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)
        with atomic_path(self.path.with_suffix(".md")) as page:
            page.write_text(markdown(self.data), encoding="utf-8")


def modes(subject: Subject, args: argparse.Namespace) -> list[Mode]:
    """Exact first, then what is compared with it."""
    cached = subject.cached.replace(state_device=args.state_device)
    found = [Mode("exact", MotionCacheConfig(method="exact", state_device=args.state_device))]
    found += [Mode(f"cached {share:g}", cached.replace(budget=share), share) for share in args.shares]
    found.append(paper_mode(subject, cached))
    if args.replay is not None:
        schedule = Schedule.read(args.replay)
        found.append(Mode(f"replay {args.replay.stem}", cached.replace(budget=None), schedule=schedule))
    return found


def paper_mode(subject: Subject, cached: MotionCacheConfig) -> Mode:
    """The share of tokens that takes the paper's part of the vanilla FLOPs over the whole video."""
    share = paper_share(subject)
    return Mode(f"paper {subject.paper[0]:g} of {subject.paper[1]:g} PFLOP", cached.replace(budget=share), share)


def measure_subject(subject: Subject, clock: Clock, args: argparse.Namespace, ceiling: float, report: Report) -> None:
    """All rows of one model."""
    if subject.has_stock and args.stock:
        stock = Mode("stock", None)
        measured = measure_steady(subject, stock, clock, STOCK_ITERATIONS, compiled=False)
        report.add(steady_row(subject, stock, measured, None, STOCK_ITERATIONS, ceiling))
    if args.compile:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        subject.transformer.compile_repeated_blocks(backend=args.compile)
    exact: Steady | None = None
    for mode in modes(subject, args):
        measured = measure_steady(subject, mode, clock, args.iterations, bool(args.compile))
        if exact is None:
            exact = measured
            add_ratios(report.rows, subject.name, exact)
        report.add(steady_row(subject, mode, measured, exact, args.iterations, ceiling))
    if args.whole:
        measure_videos(subject, clock, args, ceiling, report)
    if args.compile:
        counters = torch._dynamo.utils.counters
        report.data["compiled"][subject.name] = {
            "graphs": counters["stats"]["unique_graphs"],
            "graph_limit": torch._dynamo.config.recompile_limit,  # at the limit, further shapes run uncompiled
            "graph_breaks": sum(counters["graph_break"].values()),
            "reasons": dict(counters["graph_break"]),
        }
        report.write()


def measure_videos(subject: Subject, clock: Clock, args: argparse.Namespace, ceiling: float, report: Report) -> None:
    """The whole video, exact and at the paper's compute with its warm-up."""
    exact, *_ = modes(subject, args)
    cached = subject.cached.replace(state_device=args.state_device, warmup_steps=WARMUP_STEPS)
    exact_seconds = None
    for mode in (exact, paper_mode(subject, cached)):
        whole = measure_whole(subject, mode, clock)
        exact_seconds = exact_seconds or whole["seconds"]
        report.add(whole_row(subject, mode, whole, exact_seconds, ceiling))


def run(args: argparse.Namespace, command: str) -> None:
    """Measure all models that are asked for, on one device."""
    device = resolve_device(args.device)
    clock = Clock(device)
    head = provenance(command)
    output = (
        args.output or ROOT / "results/gpu" / f"{re.sub(r'[^a-z0-9]+', '-', head['device'].lower()).strip('-')}.json"
    )
    make_output_folder(output.parent)
    ceiling = matmul_ceiling(clock, MATMUL_SIZE[args.size])
    data = {**head, "size": args.size, "ceiling": {"matmul_tflops": ceiling / 1e12}, "compiled": {}, "rows": []}
    report = Report(output, data)
    for name in args.models:
        subject = SUBJECTS[name](args.size, device)
        data["ceiling"][f"{subject.name}_attention_tflops"] = attention_rate(clock, *subject.attention_shape) / 1e12
        measure_subject(subject, clock, args, ceiling, report)
        del subject
        gc.collect()  # a model and its hooks hold each other; the next one needs the memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    for share in args.shares:
        check_range("--shares", share, 0.01, 1)
    if args.replay is not None:
        Schedule.read(args.replay)  # complains now, and not after the first rows
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(args, shlex.join(["python", "-m", "benchmarks.full_size", *arguments]))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.full_size", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="which (both)")
    parser.add_argument(
        "--size", choices=list(MATMUL_SIZE), default="full", help="tiny runs anywhere in a minute, to try it out (full)"
    )
    parser.add_argument(
        "--shares",
        nargs="*",
        type=number,
        default=list(SHARES),
        metavar="X",
        help=f"of tokens computed per step, 0.01 to 1, a row each ({' '.join(map(str, SHARES))})",
    )
    parser.add_argument("--iterations", type=count, default=6, metavar="N", help="timed iterations per row (6)")
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="leave the library's own forward out")
    parser.add_argument("--whole", action="store_true", help="also denoise whole videos, exact and at paper compute")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="trace.json of a run, whose decisions one more row follows"
    )
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile the blocks with torch.compile (no)"
    )
    parser.add_argument(
        "--state-device", choices=("model", "cpu"), default="model", help="where K/V and cached values wait (model)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--output", type=Path, metavar="NAME.json", help="file to write (results/gpu/<device>.json); .md goes beside it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
