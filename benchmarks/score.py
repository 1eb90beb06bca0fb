"""Score every sample of a folder against the exact one of the same prompt: PSNR, SSIM and, where installed, LPIPS.

    python -m benchmarks.score outputs/table1

Scores are of the lossless files and stand beside them. What is scored already is not scored again, unless a video has
been made anew since.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from benchmarks.processes import parent_is_gone, run_in_processes
from benchmarks.samples import LOSSLESS, SCORES, SampleFolder, open_samples
from benchmarks.subject import one_thread
from common import metrics
from common.cli import Parser, count, run_command
from common.compare import EXACT
from common.console import Reporter
from common.devices import resolve_device
from common.errors import UserError
from common.files import write_json
from common.video import read_video


@dataclass(frozen=True)
class Job:
    """One sample to score.

    Attributes:
        method, stem: of the sample.
        fingerprint, reference: of the sample and of the exact one.
    """

    method: str
    stem: str
    fingerprint: str
    reference: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.score", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --output of benchmarks.sample")
    parser.add_argument(
        "--lpips", action=argparse.BooleanOptionalAction, help="with or without LPIPS (with, if it is installed)"
    )
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side on this machine (1)"
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    reporter = Reporter(Console())
    folder = open_samples(args.folder)
    with_lpips = metrics.has_lpips() if args.lpips is None else args.lpips
    if with_lpips:
        metrics.load_lpips(resolve_device("auto"))  # complains now, and not after an hour
    elif args.lpips is None:
        reporter.note(f"LPIPS is left out: it is not installed ({metrics.LPIPS_INSTALL})")
    work, orphans = unscored(folder, with_lpips)
    if args.processes > 1:
        run_in_processes(_score_share, args.processes, folder, work, with_lpips)
    else:
        _score_share(0, 1, reporter, folder, work, with_lpips)
    left, _ = unscored(folder, with_lpips)
    if left:
        raise UserError(f"{len(left)} samples could not be scored, a process has ended early; run the command again")
    reporter.note(f"{len(work)} samples scored in {folder.root}")
    if orphans:
        reporter.note(f"{orphans} samples have no exact one to be compared with; go on with benchmarks.sample")


def unscored(folder: SampleFolder, with_lpips: bool) -> tuple[list[Job], int]:
    """Samples whose scores are missing or of other videos, and how many have no reference."""
    jobs: list[Job] = []
    orphans = 0
    for method in folder.methods():
        for stem in folder.stems(method) if method != EXACT else []:
            made, exact = folder.summary(method, stem), folder.summary(EXACT, stem)
            if made is None or exact is None:
                orphans += 1
                continue
            job = Job(method, stem, made["fingerprint"], exact["fingerprint"])
            if not _is_scored(job, folder.scores(method, stem), with_lpips):
                jobs.append(job)
    return jobs, orphans


def score(video: np.ndarray, reference: np.ndarray, network: nn.Module | None) -> dict[str, float | None]:
    """All scores of a video, `[frames, height, width, 3]` uint8 as its reference; LPIPS is None without a network."""
    return {
        "psnr_db": metrics.psnr(video, reference),
        "ssim": metrics.ssim(video, reference),
        "lpips": None if network is None else metrics.lpips(video, reference, network, resolve_device("auto")),
    }


def _is_scored(job: Job, scores: dict[str, Any] | None, with_lpips: bool) -> bool:
    if scores is None or (scores["fingerprint"], scores["reference"]) != (job.fingerprint, job.reference):
        return False
    return scores["lpips"] is not None or not with_lpips


def _score_share(
    rank: int, world: int, reporter: Reporter, folder: SampleFolder, jobs: list[Job], with_lpips: bool
) -> None:
    if world > 1:
        one_thread()
    network = metrics.load_lpips(resolve_device("auto")) if with_lpips else None
    share = jobs[rank::world]
    with reporter.stage("scores", len(share)) as advance:
        for job in share:
            if parent_is_gone():
                return
            video, reference = (read_video(folder.file(m, job.stem, LOSSLESS)) for m in (job.method, EXACT))
            if video.shape != reference.shape:
                raise UserError(
                    f"{job.method}, {job.stem}: its shape {video.shape} is not that of the exact sample, "
                    f"{reference.shape}; the config was changed in between, sample all methods again"
                )
            found = {"fingerprint": job.fingerprint, "reference": job.reference, **score(video, reference, network)}
            write_json(folder.file(job.method, job.stem, SCORES), found)
            advance()


if __name__ == "__main__":
    sys.exit(main())
