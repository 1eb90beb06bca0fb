"""Memory for K/V and reused values over the length of a video, with and without K/V compression.

    python -m benchmarks.kv_memory --config configs/skyreels_v2_tiny_best.yaml configs/magi1_tiny_best.yaml \\
        --output results/kv-memory-tiny.json

Everything is computed (threshold 0), so what differs between two rows of one length is what their K/V are alone. Few
denoising steps suffice: as many chunks are at work at the same time as with all the config's steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.histories import LONG_VIDEOS
from benchmarks.processes import parent_is_gone, run_in_processes
from benchmarks.samples import find_checkpoint, sample_fingerprint, weights_digest
from benchmarks.subject import family_of, load_settings, load_subject, one_thread
from common import metrics
from common.cli import Parser, count, run_command
from common.console import Reporter, quiet_libraries
from common.errors import UserError
from common.files import atomic_path, make_output_folder, write_json
from common.results import provenance
from common.video import to_uint8

WHOLE = "all kept"
"""The way that a compressed video is compared with."""
PARTS = Path("outputs/kv-memory")


@dataclass(frozen=True)
class Case:
    """One video to measure.

    Attributes:
        config: YAML file.
        way: how its K/V are bounded.
        chunks: its length.
        options: settings that differ from the config's.
        parts: folder of finished cases and of frames to compare with.
        weights: digest of the checkpoint.
    """

    config: Path
    way: str
    chunks: int
    options: dict[str, Any]
    parts: Path
    weights: str

    @property
    def file(self) -> Path:
        """Where its row is, or will be."""
        facts = {**load_settings(self.config, options=self.options).to_dict(), "way": self.way}
        return self.parts / f"{sample_fingerprint(facts, self.weights)}.json"

    @property
    def reference(self) -> Path:
        """Where the frames of the same video with all K/V kept are, or will be."""
        free = {name: value for name, value in self.options.items() if name != "cache.kv_budget"}
        return dataclasses.replace(self, way=WHOLE, options=free).file.with_suffix(".npy")

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to make."""
        return self.file.is_file() and (self.way != WHOLE or self.reference.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "benchmarks.kv_memory", *arguments])
    return run_command(lambda: _run(_parser().parse_args(arguments), command))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.kv_memory", __doc__)
    parser.add_argument(
        "--config", nargs="+", type=Path, required=True, metavar="FILE", help="YAML files of the models"
    )
    parser.add_argument(
        "--chunks", nargs="+", type=count, default=[4, 16, 64], metavar="N", help="lengths of the videos (4 16 64)"
    )
    parser.add_argument(
        "--kv-budget", type=count, default=2, metavar="N", help="chunks' worth of clean K/V to keep (2)"
    )
    parser.add_argument("--size", type=count, metavar="N", help="height and width in pixels (the config's)")
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side on this machine (1)"
    )
    parser.add_argument("--parts", type=Path, default=PARTS, metavar="DIR", help=f"finished videos ({PARTS})")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.json", help="file to write")
    return parser


def _run(args: argparse.Namespace, command: str) -> None:
    for folder in (args.output.parent, args.parts):
        make_output_folder(folder)
    size = {} if args.size is None else {"height": args.size, "width": args.size}
    cases = [c for config in args.config for c in cases_of(config, args.chunks, args.kv_budget, size, args.parts)]
    reporter = Reporter(Console())
    for wave in ([c for c in cases if c.way == WHOLE], [c for c in cases if c.way != WHOLE]):
        missing = [case for case in wave if not case.is_done]
        processes = min(args.processes, len(missing))
        if processes > 1:
            run_in_processes(_measure_share, processes, missing)
        elif missing:
            _measure_share(0, 1, reporter, missing)
        if not all(case.is_done for case in missing):
            raise UserError("a process has ended early; run the command again, what is finished is not made anew")
    rows = [json.loads(case.file.read_text(encoding="utf-8")) for case in cases]
    write_json(args.output, {**provenance(command), "kv_budget": args.kv_budget, "rows": rows})
    reporter.note(f"{len(rows)} rows in {args.output}")


def cases_of(config: Path, lengths: Sequence[int], budget: int, size: dict[str, int], parts: Path) -> list[Case]:
    """All K/V kept, bounded as the config does, and compressed, at each length.

    Args:
        config: YAML file of either model.
        lengths: of the videos, in chunks.
        budget: chunks' worth of clean K/V that compression keeps.
        size: height and width, if other than the config's.
        parts: folder of finished cases.

    Raises:
        UserError: a length does not fit the model.
    """
    family, settings = family_of(config), load_settings(config)
    weights = weights_digest(find_checkpoint(config, settings))
    kind = LONG_VIDEOS[family]
    always = {**kind.few_steps(settings), **size, "cache.threshold": 0.0}
    cases = []
    for chunks in lengths:
        whole, bounded = kind.unbounded(settings, chunks), kind.options(settings, chunks)
        ways = {WHOLE: whole, kind.bounded: bounded, f"budget {budget}": {**whole, "cache.kv_budget": budget}}
        cases += [Case(config, way, chunks, {**always, **o}, parts, weights) for way, o in ways.items()]
    return cases


def _measure_share(rank: int, world: int, reporter: Reporter, cases: Sequence[Case]) -> None:
    if world > 1:
        one_thread()
    quiet_libraries()
    share = cases[rank::world]
    with reporter.stage("videos", len(share)) as advance:
        for case in share:
            if parent_is_gone():
                return
            write_json(case.file, measure(case))
            advance()


def measure(case: Case) -> dict[str, Any]:
    """Make a case's video; its row.

    Returns:
        `model`, `way`, `chunks`, the peaks `kv_bytes`, `values_bytes` and `total_bytes`, `kv_chunks` (most keys that a
        query attended to, in chunks), `seconds`, and `psnr_db` and `ssim` against the video with all K/V kept. They are
        None where the K/V are the same by design (all kept) or the model's own (the config's).
    """
    subject = load_subject(case.config, options=case.options)
    compared = case.way != LONG_VIDEOS[family_of(case.config)].bounded
    made = subject.sample(subject.settings.prompt, subject.settings.seed, subject.settings.cache, decode=compared)
    records, peaks = made.trace.records, made.trace.peak_bytes
    row = {
        "model": subject.folder.name,
        "way": case.way,
        "chunks": case.chunks,
        **{f"{kind}_bytes": peaks[kind] for kind in ("kv", "values", "total")},
        "kv_chunks": round(max(r.kv_tokens / r.tokens_total for r in records), 2),
        "seconds": round(made.seconds, 2),
        "steps": subject.settings.steps,
        "psnr_db": None,
        "ssim": None,
    }
    if not compared:
        return row
    frames = to_uint8(made.frames)
    if case.way == WHOLE:
        with atomic_path(case.reference) as partial:
            np.save(partial, frames)
        return row
    kept = np.load(case.reference)
    return row | {"psnr_db": round(metrics.psnr(frames, kept), 3), "ssim": round(metrics.ssim(frames, kept), 4)}


if __name__ == "__main__":
    sys.exit(main())
