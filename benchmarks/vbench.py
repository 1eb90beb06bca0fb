"""Score a folder of samples with VBench, whose package lives in an environment of its own.

    bash scripts/score_vbench.sh outputs/vbench        # makes that environment, then runs this
    python -m benchmarks.vbench outputs/vbench --scorer .venv-vbench/bin/vbench

Writes `OUT/vbench.json`: per method the score of each dimension and the totals, in percent. Raw results and logs stay
in `OUT/.vbench/<method>/<dimension>`; what is scored already is not scored again, unless a video has been made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.samples import VIDEO, SampleFolder, open_samples
from benchmarks.vbench_prompts import PROMPT_LIST, VENV, check_dimensions, installed_info, read_prompts
from benchmarks.vbench_totals import with_totals
from common.cli import Parser, count, run_command
from common.console import Reporter
from common.errors import UserError
from common.files import write_json

EXIT_FAILED = 1
RESULTS = "vbench.json"
WORK = ".vbench"
SCORE, LOG = "score.json", "log.txt"


class NotScored(Exception):
    """A dimension that could not be scored; the message says why."""


@dataclass(frozen=True)
class Task:
    """A method's videos for one dimension.

    Attributes:
        method, dimension: which.
        videos: by stem, the sample's fingerprint.
        without: prompts of the dimension that have no video.
    """

    method: str
    dimension: str
    videos: dict[str, str]
    without: int

    @property
    def fingerprint(self) -> str:
        """Of all the videos."""
        return hashlib.sha256(json.dumps(self.videos, sort_keys=True).encode()).hexdigest()[:32]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if some dimensions could not be scored."""
    failures: list[str] = []
    code = run_command(lambda: failures.extend(_run(_parser().parse_args(argv))))
    return code or (EXIT_FAILED if failures else 0)


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.vbench", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --output of benchmarks.sample")
    parser.add_argument(
        "--scorer",
        type=Path,
        default=VENV / "bin/vbench",
        metavar="FILE",
        help="the vbench command (.venv-vbench/bin/vbench)",
    )
    parser.add_argument("--dimensions", nargs="+", metavar="NAME", help="to score, such as color (all with videos)")
    parser.add_argument("--source", type=Path, metavar="FILE", help="VBench_full_info.json (the installed package's)")
    parser.add_argument("--gpus", type=count, default=1, metavar="N", help="GPUs that VBench uses (1)")
    return parser


def _run(args: argparse.Namespace) -> list[str]:
    reporter = Reporter(Console())
    folder = open_samples(args.folder)
    scorer = args.scorer.absolute()
    if not os.access(scorer, os.X_OK):
        raise UserError(f"--scorer {str(args.scorer)!r} is no command; make it with: bash scripts/score_vbench.sh")
    names = check_dimensions(args.dimensions or PROMPT_LIST)
    info = (args.source or installed_info()).absolute()
    tasks = [task for name in folder.methods() for task in _tasks(folder, name, names, info) if task.videos]
    if not tasks:
        raise UserError(
            f"{str(args.folder)!r} holds no videos of VBench's prompts; sample an experiment with "
            "'prompts: {vbench: all}', or name --dimensions that were sampled"
        )
    failures = []
    with reporter.stage("dimensions", len(tasks)) as advance:
        for task in tasks:
            try:
                if task.without:
                    raise NotScored(f"{task.without} of its prompts have no video; go on with benchmarks.sample")
                _score(folder, task, scorer, info, args.gpus)
            except NotScored as error:
                failures.append(f"{task.method}, {task.dimension}: {error}")
            write_json(folder.root / RESULTS, _collect(folder, tasks))
            advance()
    reporter.note(f"{len(tasks) - len(failures)} of {len(tasks)} scores in {folder.root / RESULTS}")
    for line in failures:
        reporter.console.print(f"not scored: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    return failures


def _tasks(folder: SampleFolder, method: str, dimensions: Sequence[str], info: Path) -> list[Task]:
    whole = {stem: made["fingerprint"] for stem in folder.stems(method) if (made := folder.summary(method, stem))}
    tasks = []
    for dimension in dimensions:
        prompts = {name for name, _ in read_prompts([dimension], info)}
        videos = {stem: mark for stem, mark in whole.items() if stem.rpartition("-")[0] in prompts}
        without = len(prompts - {stem.rpartition("-")[0] for stem in videos})
        tasks.append(Task(method, dimension, videos, without))
    return tasks


def _score(folder: SampleFolder, task: Task, scorer: Path, info: Path, gpus: int) -> None:
    """Run VBench on a task and keep its score, unless it is there.

    Raises:
        NotScored: VBench left no score.
    """
    work = _work(folder, task)
    if _kept(work, task) is not None:
        return
    shutil.rmtree(work, ignore_errors=True)
    videos = work / "videos"
    videos.mkdir(parents=True)
    for stem in task.videos:  # VBench takes the ending of the folder's first file for that of all videos
        (videos / (stem + VIDEO)).symlink_to(folder.file(task.method, stem, VIDEO).absolute())
    # Paths are relative, as VBench pastes them into a command line without quotes.
    (work / "info.json").symlink_to(info)
    command = [str(scorer), "evaluate", "--ngpus", str(gpus), "--dimension", task.dimension]
    command += ["--videos_path", "videos", "--output_path", "results", "--full_json_dir", "info.json"]
    # It starts `python` again, which must be that of its own environment.
    path = os.pathsep.join([str(scorer.parent), os.environ.get("PATH", "")])
    with (work / LOG).open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=work, env={**os.environ, "PATH": path}, stdout=log, stderr=subprocess.STDOUT)
    score = _read_score(work, task.dimension)
    write_json(work / SCORE, {"fingerprint": task.fingerprint, "score": score, "videos": len(task.videos)})


def _read_score(work: Path, dimension: str) -> float:
    """VBench ends without an error when it fails, so only its results tell."""
    for file in sorted(work.glob("results/*_eval_results.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        if dimension in results:
            return float(results[dimension][0])
    lines = [line.strip() for line in re.split(r"[\r\n]+", (work / LOG).read_text(encoding="utf-8", errors="replace"))]
    last = next((line for line in reversed(lines) if line), "it said nothing")
    raise NotScored(f"VBench left no score ({last}); its words are in {work / LOG}")


def _work(folder: SampleFolder, task: Task) -> Path:
    return folder.root / WORK / task.method / task.dimension


def _kept(work: Path, task: Task) -> float | None:
    """The score of exactly these videos, if it is there."""
    try:
        kept = json.loads((work / SCORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept["score"] if kept["fingerprint"] == task.fingerprint else None


def _collect(folder: SampleFolder, tasks: Sequence[Task]) -> dict[str, Any]:
    """All scores that are there, those of dimensions that were not asked for this time included."""
    asked = {(task.method, task.dimension): task for task in tasks}
    scores: dict[str, dict[str, float]] = {}
    for file in folder.root.glob(f"{WORK}/*/*/{SCORE}"):
        method, dimension = file.parts[-3:-1]
        task = asked.get((method, dimension))
        score = json.loads(file.read_text(encoding="utf-8"))["score"] if task is None else _kept(file.parent, task)
        if score is not None:
            scores.setdefault(method, {})[dimension] = score
    return {method: with_totals(of) for method, of in sorted(scores.items())}


if __name__ == "__main__":
    sys.exit(main())
