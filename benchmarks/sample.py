"""Make all videos of an experiment (see `benchmarks/experiment.py`), with every method.

    python -m benchmarks.sample configs/experiments/table1_skyreels_v2_tiny.yaml --output outputs/table1
    python -m benchmarks.sample EXPERIMENT --output DIR --processes 4     # several processes on this machine
    accelerate launch -m benchmarks.sample EXPERIMENT --output DIR        # several GPUs or machines, one folder

What is finished is not made again: the same command goes on where an earlier one ended. All methods of a prompt are
made one after the other by one process, so that their times can be compared. `docs/comparisons.md` describes the files.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from benchmarks.experiment import Experiment
from benchmarks.processes import run_in_processes
from benchmarks.samples import SampleFolder, find_checkpoint, weights_digest
from benchmarks.sampling import Place, Plan, make_share
from common.cli import Interrupted, Parser, count, run_command
from common.console import Reporter, show_log
from common.devices import resolve_device
from common.errors import UserError
from common.files import make_output_folder, write_json

EXIT_FAILED = 1
LISTED = 20
PATIENCE = timedelta(days=365)
"""How long a process waits for the others: as long as it takes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if some samples could not be made."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    missing: list[str] = []
    code = run_command(lambda: missing.extend(_run(arguments)))
    return code or (EXIT_FAILED if missing else 0)


def _run(arguments: list[str]) -> list[str]:
    """All of it; lines on what could not be made."""
    args = _parser().parse_args(arguments)
    experiment = Experiment.load(args.experiment)
    if args.prompts is not None:
        experiment = dataclasses.replace(experiment, prompts=experiment.prompts[: args.prompts])
    device = resolve_device(experiment.settings.device)
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if args.processes > 1 and state.num_processes > 1:
        raise UserError("--processes is for one machine without 'accelerate launch'; leave one of the two out")
    group = _meet(state)
    reporter = Reporter(Console(quiet=not state.is_main_process))
    show_log(reporter.console)
    folder = SampleFolder(make_output_folder(args.output))
    with reporter.busy("reading the checkpoint"):
        weights = weights_digest(find_checkpoint(experiment.config, experiment.settings))
    plan = Plan(experiment, folder, weights)
    if state.is_main_process:
        _announce(plan, reporter, shlex.join(["python", "-m", "benchmarks.sample", *arguments]))
    try:
        if args.processes > 1:
            run_in_processes(_make_one_share, args.processes, plan)
        else:
            place = Place.of(device, state.process_index, state.num_processes, state.local_process_index)
            make_share(plan, place, reporter)
            if group is not None:
                torch.distributed.barrier(group)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_standing(plan)) from interrupt
    missing = plan.missing() if state.is_main_process else []
    _report(plan, missing, reporter)
    return missing


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.sample", __doc__)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="YAML file, see configs/experiments/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the samples")
    parser.add_argument("--prompts", type=count, metavar="N", help="only the experiment's first N prompts (all)")
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side on this machine (1)"
    )
    return parser


def _announce(plan: Plan, reporter: Reporter, command: str) -> None:
    experiment = plan.experiment
    reporter.note(f", {experiment.path.name}: {_standing(plan)}", head=experiment.settings.model)
    stems = [prompt.stem for prompt in experiment.prompts]
    facts = {"experiment": str(experiment.path), "command": command, "settings": experiment.changes}
    write_json(plan.folder.root / "experiment.json", {**facts, "methods": list(experiment.methods), "stems": stems})


def _make_one_share(rank: int, world: int, reporter: Reporter, plan: Plan) -> None:
    make_share(plan, Place.of(resolve_device(plan.experiment.settings.device), rank, world, rank), reporter)


def _meet(state: PartialState) -> torch.distributed.ProcessGroup | None:
    """Where the processes of `accelerate launch` wait for each other at the end; NCCL would keep GPUs busy with it."""
    if state.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _standing(plan: Plan) -> str:
    total = len(plan.experiment.prompts) * len(plan.experiment.methods)
    done = total - len(plan.missing())
    return f"{done} of {total} samples are complete in {plan.folder.root}"


def _report(plan: Plan, missing: list[str], reporter: Reporter) -> None:
    reporter.note(_standing(plan))
    for line in missing[:LISTED]:
        reporter.console.print(f"not made: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    if missing:
        more = f"{len(missing) - LISTED} more; " if len(missing) > LISTED else ""
        reporter.note(f"{more}*.error.txt in the methods' folders tell what happened; the same command tries again")


if __name__ == "__main__":
    sys.exit(main())
