"""Choose the thresholds of an experiment's methods at matched compute.

    python -m benchmarks.match configs/experiments/table1_skyreels_v2_tiny.yaml --processes 4

A method named KIND@SHARE gets the threshold whose share of exact's FLOPs is nearest to SHARE, over other prompts than
the experiment's. Where its distance is a table, that is measured first. The file's values are rewritten in place.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.experiment import Experiment
from benchmarks.runs import Runs, warm
from benchmarks.samples import find_checkpoint, weights_digest
from benchmarks.search import REACH, TOLERANCE, Point, Target
from benchmarks.subject import FAMILIES, family_of
from benchmarks.takes import TakeSets
from benchmarks.thresholds import (
    Distance,
    check_searchable,
    find_threshold,
    measure_distance,
    measured_curve,
    tell_threshold,
)
from benchmarks.yaml_text import Shared, set_values
from common.cache import MotionCacheConfig
from common.cache.foretell import is_foretellable
from common.cli import Interrupted, Parser, count, run_command
from common.console import Reporter, quiet_libraries, show_log
from common.errors import UserError
from common.files import atomic_path

LEDGERS = Path("outputs/match")
TABLE = "measured"
"""Anchor of the measured table in the file."""


@dataclass
class Group:
    """Methods that differ in their threshold alone: they share a curve.

    Attributes:
        cache: theirs, with the threshold of one of them as a first guess.
        targets: by method.
    """

    cache: MotionCacheConfig
    targets: dict[str, Target] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    experiment = Experiment.load(args.experiment)
    groups = group_methods(experiment)
    takes = TakeSets.load(args.prompts, file=args.prompts_file)
    weights = weights_digest(find_checkpoint(experiment.config, experiment.settings))
    load = functools.partial(warm, functools.partial(FAMILIES[family_of(experiment.config)][1], experiment.settings))
    ledger = args.ledger or LEDGERS / f"{experiment.config.stem}.runs.jsonl"
    reporter = Reporter(Console())
    show_log(reporter.console)
    quiet_libraries()
    with Runs(load, experiment.settings, weights, ledger, reporter, args.processes) as runs:
        try:
            values = match(groups, runs, takes, args.distance)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(f"runs so far are in {ledger}; the same command goes on from there") from interrupt
    text = set_values(args.experiment.read_text(encoding="utf-8"), values)
    with atomic_path(args.experiment) as partial:
        partial.write_text(text, encoding="utf-8")
    reporter.note(f"rewrote {args.experiment}")


def group_methods(experiment: Experiment) -> list[Group]:
    """The methods of an experiment that are named KIND@SHARE, by what they have in common.

    Raises:
        UserError: there are none, or one of them has no threshold or an impossible share.
    """
    groups: dict[MotionCacheConfig, Group] = {}
    for name, method in experiment.methods.items():
        _, at, share = name.partition("@")
        if not at:
            continue
        if method.cache is None:
            raise UserError(f"method {name!r} is the unmodified pipeline and has no threshold; rename or remove it")
        try:
            check_searchable(method.cache)
            target = Target.parse(f"share={share}")
        except UserError as error:
            raise UserError(f"method {name!r}: {error}") from error
        key = method.cache.replace(threshold=0.0)
        groups.setdefault(key, Group(method.cache)).targets[name] = target
    if not groups:
        raise UserError(f"experiment {str(experiment.path)!r} has no method named KIND@SHARE, such as 'flowcache@0.3'")
    return list(groups.values())


def match(groups: Sequence[Group], runs: Runs, takes: TakeSets, distance: Distance) -> dict[tuple[str, ...], Any]:
    """New values for an experiment's file, by their place in it (see `set_values`).

    Args:
        groups: what to match.
        runs: makes what is missing.
        takes: videos to measure distances and to choose thresholds on.
        distance: `table` measures the tables of all methods that have one, `keep` leaves them.

    Raises:
        UserError: a share cannot be reached; the line names the method.
    """
    values: dict[tuple[str, ...], Any] = {}
    for group in groups:
        cache = group.cache
        if cache.distance == "table" and distance == "table":
            cache = measure_distance(runs, cache, "table", takes.calibration)
            table = Shared(TABLE, list(cache.distance_table))
            values |= {("methods", name, "cache", "distance_table"): table for name in group.targets}
        for name, point in _choose(group, cache, runs, takes).items():
            values["methods", name, "cache", "threshold"] = point.threshold
            miss = group.targets[name].miss(point)
            more = f", {miss:.0%} off" if miss > TOLERANCE else ""
            note = " (no nearer one: whole chunks decide)" if miss > REACH and not cache.token_level else ""
            runs.reporter.note(f"{name}: threshold {point.threshold:g}, compute {point.share:.4f}{more}{note}")
    return values


def _choose(group: Group, cache: MotionCacheConfig, runs: Runs, takes: TakeSets) -> dict[str, Point]:
    """The nearest point for each method of a group, from the largest share down."""
    curve = measured_curve(runs, cache, takes.choosing, frames=False)
    found = {}
    for name, target in sorted(group.targets.items(), key=lambda item: -item[1].value):
        try:
            if is_foretellable(cache):
                found[name] = tell_threshold(runs, cache, target, takes.choosing[0])
            else:
                found[name] = find_threshold(runs, target, curve, cache, takes.choosing[0])
        except UserError as error:
            raise UserError(f"method {name!r}: {error}") from error
    return found


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.match", __doc__)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="YAML file, rewritten in place")
    parser.add_argument("--prompts", type=count, default=8, metavar="N", help="prompts to choose on (8)")
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="a prompt per line, instead of the tiny models' grammar"
    )
    parser.add_argument(
        "--distance", choices=("table", "keep"), default="table", help="measure tables first, or keep them (table)"
    )
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side, of one thread each (1)"
    )
    parser.add_argument("--ledger", type=Path, metavar="FILE", help=f"figures of runs ({LEDGERS}/<config>.runs.jsonl)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
