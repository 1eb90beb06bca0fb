"""Find the threshold, and what else is asked for, that reaches a share of compute, a speedup or a PSNR.

    python -m benchmarks.calibrate --config configs/skyreels_v2_tiny_slow.yaml --target share=0.3 --output my.yaml
    python -m benchmarks.calibrate --config CONFIG --target psnr=30 --distance table --tune alpha --output my.yaml

Writes a YAML preset, a copy of the config with what was found, and beside it the measured curve as JSON and PNG.
Figures of single runs are kept in a file: the same command goes on where an earlier one ended (`docs/calibrate.md`).
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.preset import Calibration, write_calibration
from benchmarks.runs import Runs, warm
from benchmarks.samples import find_checkpoint, weights_digest
from benchmarks.search import NEVER, REACH, Point, Target
from benchmarks.subject import FAMILIES, family_of, load_settings
from benchmarks.takes import TakeSets
from benchmarks.thresholds import TUNABLE, Distance, check_searchable, measure_distance, tune
from common.cache import MotionCacheConfig
from common.cli import Interrupted, Parser, count, parse_assignment, run_command, whole_number
from common.console import Reporter, quiet_libraries, show_log
from common.errors import UserError
from common.files import make_output_folder
from common.results import provenance
from common.settings import VARIANTS, RunSettings

METHODS = {"motioncache": {"method": "motioncache"}, **VARIANTS}
"""What `--method` changes in a config's cache settings."""
METHODS["flowcache"] = {**METHODS["motioncache"], **METHODS["flowcache"]}
EXIT_MISSED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if the nearest point is not near enough to the target."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    reached: list[bool] = []
    code = run_command(lambda: reached.append(_run(arguments)))
    return code or (0 if all(reached) else EXIT_MISSED)


def _run(arguments: list[str]) -> bool:
    """All of it; whether the target was reached."""
    args = _parser().parse_args(arguments)
    target = Target.parse(args.target)
    settings, options = _settings(args)
    takes = TakeSets.load(args.prompts, args.held_out, args.prompts_file)
    if args.processes > 1 and target.kind == "speedup":
        raise UserError(f"--processes {args.processes}: side by side, times say nothing; give 1 to measure a speedup")
    if args.output.suffix not in (".yaml", ".yml") or args.output.resolve() == args.config.resolve():
        raise UserError(f"--output {str(args.output)!r} is not allowed; give a new file that ends in .yaml")
    make_output_folder(args.output.resolve().parent)
    weights = weights_digest(find_checkpoint(args.config, settings))
    load = functools.partial(warm, functools.partial(FAMILIES[family_of(args.config)][1], settings))
    reporter = Reporter(Console())
    show_log(reporter.console)
    quiet_libraries()
    ledger = args.output.with_suffix(".runs.jsonl")
    with Runs(load, settings, weights, ledger, reporter, args.processes) as runs:
        try:
            found = _calibrate(args, runs, target, takes)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(f"runs so far are in {ledger}; the same command goes on from there") from interrupt
        runs.forget_references()
    command = shlex.join(["python", "-m", "benchmarks.calibrate", *arguments])
    facts = {**provenance(command), "config": str(args.config), "weights": weights, "processes": args.processes}
    write_calibration(args.output, args.config, options, found, facts)
    reporter.note(f"wrote {args.output}, and its curve as .json and .png")
    return found.reached


def _calibrate(args: argparse.Namespace, runs: Runs, target: Target, takes: TakeSets) -> Calibration:
    settings, reporter = runs.settings, runs.reporter
    reporter.note(f": {target}, chosen on {len(takes.choosing)} prompts", head=settings.model)

    def note(cache: MotionCacheConfig, point: Point) -> None:
        reporter.note(f"{'all reused after warm-up' if point.threshold == NEVER else cache.tag}: {point}")

    cache = measure_distance(runs, settings.cache, args.distance, takes.calibration)
    if target.kind != "psnr":  # what one prompt says of the share and of the speed, it says of all
        target.check_reachable(runs.point(cache.replace(threshold=NEVER), takes.choosing[:1], frames=True))
    trials = tune(runs, cache, target, args.tune, takes.choosing, settings.steps, note)
    best = trials[0]
    held_out = None
    if takes.held_out:
        held_out = runs.point(best.cache, takes.held_out, frames=True)
    found = Calibration(target, best, trials, held_out)
    reporter.note(f": {best.point}", head=f"threshold {best.point.threshold:g}")
    if held_out is not None:
        reporter.note(f"with {held_out.prompts} held-out prompts: {held_out}")
    if not found.reached:
        reporter.note(f"{target} is missed by {found.miss:.1%}, more than {REACH:.0%}: {found.advice}")
    return found


def _settings(args: argparse.Namespace) -> tuple[RunSettings, dict[str, object]]:
    """Settings to begin with, and what was said on top of the config's."""
    options = dict(parse_assignment(text) for text in args.set)
    if args.method is not None:
        options |= {f"cache.{key}": value for key, value in METHODS[args.method].items()}
    settings = load_settings(args.config, args.preset, options)
    if settings.kind != "text":
        raise UserError(f"config {str(args.config)!r} gives a {settings.kind}; calibrate on text alone, leave it out")
    check_searchable(settings.cache, args.tune)
    if args.method == "motioncache" and not settings.cache.token_level:
        raise UserError(
            f"--method motioncache: alpha {settings.cache.alpha:g} makes it flowcache; add --set cache.alpha=0.6"
        )
    return settings, options


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.calibrate", __doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file to begin with")
    parser.add_argument("--target", required=True, metavar="KIND=VALUE", help="share=0.3, speedup=2 or psnr=30")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="NEW.yaml",
        help="preset to write; .json, .png and .runs.jsonl go beside it",
    )
    parser.add_argument("--preset", metavar="NAME", help="cache settings to begin with, as --preset of run_*.sh")
    parser.add_argument("--method", choices=list(METHODS), help="way of caching, instead of the config's")
    parser.add_argument("--tune", nargs="+", choices=TUNABLE, default=[], help="find these too, at the target")
    parser.add_argument(
        "--distance",
        choices=get_args(Distance),
        default="keep",
        help="what tells how much a step counts: the config's, or measured first: how much the residual changes "
        "(table), what leaving the step out does to the result (sensitivity), or a polynomial (modulation) (keep)",
    )
    parser.add_argument("--prompts", type=count, default=8, metavar="N", help="prompts to choose on (8)")
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a prompt per line, instead of the tiny models' grammar"
    )
    parser.add_argument(
        "--held-out", type=whole_number, default=0, metavar="N", help="further prompts to check with (0)"
    )
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side, of one thread each (1)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the config; may be repeated"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
