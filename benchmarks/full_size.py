"""Speed of the real architectures on one GPU, with random weights.

    python -m benchmarks.full_size

SkyReels-V2 1.3B at 544×960 and MAGI-1 4.5B at 720×720: the library's own forward, exact, and cached at several shares
of tokens, eager and with compiled blocks, a few iterations each in which all chunks are active. Writes
`results/gpu/<device>.json` and the same as a Markdown page, after each row. `docs/speed.md` says how to read them.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.bench import Bench
from benchmarks.speed.checks import Check, checks, compiled_checks
from benchmarks.speed.failures import first_line
from benchmarks.speed.instruments import Clock, matmul_ceiling
from benchmarks.speed.magi import Magi
from benchmarks.speed.measure import steady_iterations
from benchmarks.speed.page import markdown
from benchmarks.speed.replay import Schedule
from benchmarks.speed.rows import Row, Wanted, stages
from benchmarks.speed.skyreels import SkyReels
from benchmarks.speed.subject import Subject
from benchmarks.speed.table import add_speedups
from common.checks import check_range
from common.cli import Interrupted, Parser, count, number, run_command
from common.devices import resolve_device
from common.files import atomic_path, make_output_folder, write_json
from common.results import provenance

logger = logging.getLogger("full_size")
ROOT = Path(__file__).resolve().parents[1]
SUBJECTS: dict[str, Callable[..., Subject]] = {"skyreels": SkyReels, "magi": Magi}
SHARES = (0.2, 0.4, 0.6, 0.8)
MATMUL_SIZE = {"full": 8192, "tiny": 256}
FAILED = 1


class Report:
    """The result files, written anew with each row, so that a run that is cut off leaves what it measured."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @contextmanager
    def attempt(self, model: str, what: str) -> Iterator[None]:
        """An error inside is recorded, and the run goes on."""
        try:
            yield
        except Exception as error:
            logger.exception("%s %s failed", model, what)
            self.data["failed"].append({"model": model, "what": what, "error": first_line(error)})
            self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        add_speedups(self.data["rows"])
        logger.info("%s %s: %.4g s per iteration", row["model"], row["mode"], row["seconds"])
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)
        with atomic_path(self.path.with_suffix(".md")) as page:
            page.write_text(markdown(self.data), encoding="utf-8")

    @property
    def sound(self) -> bool:
        """Whether nothing failed and no check is off."""
        return not self.data["failed"] and all(check["passed"] for check in self.data["checks"])


def run(args: argparse.Namespace, command: str, now: Callable[[], float] = time.monotonic) -> bool:
    """Measure all models that are asked for, on one device.

    Args:
        args: the options.
        command: as it was typed.
        now: the clock of the time limit, in seconds.

    Returns:
        Whether everything that was begun went well.
    """
    began = now()
    device = resolve_device(args.device)
    schedule = None if args.replay is None else (args.replay.stem, Schedule.read(args.replay))
    wanted = Wanted(args.iterations, args.shares, args.stock, not args.only_eager, args.whole, schedule)
    backend = None if args.only_eager else args.compile_backend
    for name in args.models:  # complains now, and not after the first rows
        SUBJECTS[name](args.size, torch.device("meta")).steady(steady_iterations(args.iterations))
    clock = Clock(device)
    head = provenance(command)
    output = args.output or ROOT / "results/gpu" / f"{_file_name(head['device'])}.json"
    make_output_folder(output.parent)
    ceiling = matmul_ceiling(clock, MATMUL_SIZE[args.size])
    report = Report(output, _new_data(head, args, ceiling))
    try:
        for name in args.models:
            _check(name, lambda name=name: checks(SUBJECTS[name], device), report)
        benches: list[Bench] = []
        for name in args.models:
            with report.attempt(name, "model with random weights"):
                bench = Bench(SUBJECTS[name](args.size, device), clock, ceiling, backend)
                report.data["models"][bench.subject.name] = bench.look()
                benches.append(bench)
                bench.leave()
        compiler_is_checked = False
        for bench, row in _in_order(benches, wanted):
            if args.time_limit is not None and now() - began > args.time_limit:
                report.data["missing"].append({"model": bench.subject.name, "mode": row.name})
                continue
            if row.compiled and not compiler_is_checked:
                compiler_is_checked = True
                for name in args.models:
                    _check(name, lambda name=name: compiled_checks(SUBJECTS[name], device, backend), report)
            with report.attempt(bench.subject.name, row.name):
                for other in benches:
                    if other is not bench:
                        other.leave()
                report.add(bench.measure(row))
    except KeyboardInterrupt:
        raise Interrupted(f"{output} has {len(report.data['rows'])} rows") from None
    report.write()
    return report.sound


def _new_data(head: dict[str, Any], args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    return {
        **head,
        "size": args.size,
        "time_limit": args.time_limit,
        "checks": [],
        "ceiling": {"matmul_tflops": ceiling / 1e12},
        "models": {},
        "rows": [],
        "failed": [],
        "missing": [],
    }


def _check(name: str, wanted: Callable[[], Iterator[Check]], report: Report) -> None:
    """Compare what the device computes at the tiny size, and go on whatever comes out."""
    with report.attempt(name, "checks"):
        for check in wanted():
            with report.attempt(check.model, check.name):
                difference = check.run()
                passed = difference <= check.tolerance
                logger.info("%s %s: %.2g%s", check.model, check.name, difference, "" if passed else ", too much")
                report.data["checks"].append(
                    {
                        "model": check.model,
                        "check": check.name,
                        "difference": min(difference, 1e300),  # JSON knows no infinity
                        "tolerance": check.tolerance,
                        "passed": passed,
                    }
                )


def _in_order(benches: Sequence[Bench], wanted: Wanted) -> Iterator[tuple[Bench, Row]]:
    """All models' rows, stage by stage."""
    plans = [(bench, stages(bench.subject, wanted)) for bench in benches]
    for stage in range(max((len(plan) for _, plan in plans), default=0)):
        for bench, plan in plans:
            for row in plan[stage]:
                yield bench, row


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a row failed or a check is off."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sound: list[bool] = []
    return run_command(lambda: sound.append(_run(arguments))) or (0 if all(sound) else FAILED)


def _run(arguments: list[str]) -> bool:
    args = _parser().parse_args(arguments)
    for share in args.shares:
        check_range("--shares", share, 0.01, 1)
    if args.time_limit is not None:
        check_range("--time-limit", args.time_limit, 0, None)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return run(args, shlex.join(["python", "-m", "benchmarks.full_size", *arguments]))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.full_size", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="which (both)")
    parser.add_argument(
        "--size", choices=list(MATMUL_SIZE), default="full", help="tiny runs anywhere in minutes, to try it out (full)"
    )
    parser.add_argument(
        "--shares",
        nargs="*",
        type=number,
        default=list(SHARES),
        metavar="X",
        help=f"of tokens computed per step, 0.01 to 1, a row each ({' '.join(map(str, SHARES))})",
    )
    parser.add_argument("--iterations", type=count, default=3, metavar="N", help="timed iterations per row (3)")
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="leave the library's own forward out")
    parser.add_argument("--only-eager", action="store_true", help="leave the rows with compiled blocks out")
    parser.add_argument(
        "--compile-backend",
        choices=("inductor", "eager"),
        default="inductor",
        help="of torch.compile; eager needs no compiler, and gains nothing (inductor)",
    )
    parser.add_argument("--whole", action="store_true", help="also denoise whole videos, exact and at paper compute")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="trace.json of a run, whose decisions one more row follows"
    )
    parser.add_argument("--time-limit", type=number, metavar="SECONDS", help="begin no new row after that (none)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--output", type=Path, metavar="NAME.json", help="file to write (results/gpu/<device>.json); .md goes beside it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
