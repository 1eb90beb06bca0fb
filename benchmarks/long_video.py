"""Quality chunk by chunk over a long video: what caching costs, and what exact would have made of the same start.

    python -m benchmarks.long_video configs/experiments/best_skyreels_v2_tiny.yaml \\
        --methods best-matched@0.3 flowcache-matched@0.3 --output results/long-video-skyreels-tiny.json

Each prompt's video is made exactly, and by each method in two ways: from its own history, and with every window (in
MAGI-1 every chunk) made from exact's history, which shows what caching costs at that place of the video and nothing
else. The first method has a third: cached in the first window alone and then exact, which shows how far a video goes
astray by itself. A prompt that is finished is not made again when the command is repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.experiment import Experiment, Prompt
from benchmarks.histories import FIRST, GIVEN, LONG_VIDEOS, OWN, LongVideo, Made
from benchmarks.processes import parent_is_gone, run_in_processes
from benchmarks.samples import find_checkpoint, sample_fingerprint, weights_digest
from benchmarks.subject import family_of, load_settings, load_subject, one_thread
from common import metrics
from common.cache import MotionCacheConfig, Trace
from common.checks import near_miss
from common.cli import Parser, count, run_command
from common.console import Reporter, quiet_libraries
from common.errors import UserError
from common.files import make_output_folder, write_json
from common.results import provenance
from common.video import to_uint8

PARTS = Path("outputs/long-video")


@dataclass(frozen=True)
class Work:
    """Everything that the processes need to know.

    Attributes:
        config: the model's settings file.
        chunks: of each video.
        options: settings that make it so long.
        methods: by name, the first of which is also cached in its first window alone.
        prompts: to make.
        parts: folder of finished prompts.
        facts: settings and methods, all that a finished prompt depends on besides itself and the weights.
        weights: digest of the checkpoint.
    """

    config: Path
    chunks: int
    options: dict[str, Any]
    methods: dict[str, MotionCacheConfig]
    prompts: list[Prompt]
    parts: Path
    facts: dict[str, Any]
    weights: str

    def file(self, prompt: Prompt) -> Path:
        """Where a finished prompt's figures are, or will be."""
        facts = {**self.facts, "prompt": prompt.text, "seed": prompt.seed}
        return self.parts / f"{sample_fingerprint(facts, self.weights)}.json"

    def unfinished(self) -> list[Prompt]:
        """Prompts that are still to be made."""
        return [prompt for prompt in self.prompts if not self.file(prompt).is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "benchmarks.long_video", *arguments])
    return run_command(lambda: _run(_parser().parse_args(arguments), command))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.long_video", __doc__)
    parser.add_argument("experiment", type=Path, metavar="FILE", help="YAML file of configs/experiments/")
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="NAME", help="of the experiment, the one in question first"
    )
    parser.add_argument("--chunks", type=count, default=24, metavar="N", help="chunks of each video (24)")
    parser.add_argument("--prompts", type=count, default=2, metavar="N", help="first prompts of the experiment (2)")
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes side by side on this machine (1)"
    )
    parser.add_argument("--parts", type=Path, default=PARTS, metavar="DIR", help=f"finished prompts ({PARTS})")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.json", help="file to write")
    return parser


def _run(args: argparse.Namespace, command: str) -> None:
    make_output_folder(args.output.parent)
    make_output_folder(args.parts)
    work = plan_work(args.experiment, args.methods, args.chunks, args.prompts, args.parts)
    reporter = Reporter(Console())
    missing = work.unfinished()
    processes = min(args.processes, len(missing))
    if processes > 1:
        run_in_processes(_make_share, processes, work, missing)
    elif missing:
        _make_share(0, 1, reporter, work, missing)
    left = work.unfinished()
    if left:
        raise UserError(f"{len(left)} prompts are not finished, a process has ended early; run the command again")
    found = [json.loads(work.file(prompt).read_text(encoding="utf-8")) for prompt in work.prompts]
    first = found[0]["at_once"]
    name = find_checkpoint(work.config, load_settings(work.config)).name
    facts = {"model": name, "chunks": args.chunks, "first_window": first}
    write_json(args.output, {**provenance(command), **facts, "rows": rows_of(found, first)})
    reporter.note(f"{len(found)} prompts in {args.output}")


def plan_work(path: Path, methods: Sequence[str], chunks: int, prompts: int, parts: Path) -> Work:
    """Check what is asked for.

    Args:
        path: experiment file.
        methods: names of its methods.
        chunks: of each video.
        prompts: how many of the experiment's, from the first.
        parts: folder for finished prompts.

    Raises:
        UserError: there is no such method, it caches nothing or decides for all chunks together, or there are fewer
            prompts.
    """
    experiment = Experiment.load(path)
    for name in methods:
        if name not in experiment.methods:
            raise UserError(f"--methods {name!r} is not in {str(path)!r}; {near_miss(name, experiment.methods)}")
        cache = experiment.methods[name].cache
        if cache is None or cache.method != "motioncache":
            raise UserError(f"--methods {name!r} does not decide chunk by chunk; give one of method 'motioncache'")
        if cache.token_level or cache.kv_budget is not None:
            what = "selects tokens" if cache.token_level else "compresses K/V"
            raise UserError(f"--methods {name!r} {what}, which cannot be given another history; give one with alpha: 1")
    if prompts > len(experiment.prompts):
        raise UserError(f"--prompts {prompts} is not allowed; {str(path)!r} has {len(experiment.prompts)}")
    caches = {name: experiment.methods[name].cache for name in methods}
    options = {**experiment.changes, **LONG_VIDEOS[family_of(experiment.config)].options(experiment.settings, chunks)}
    settings = load_settings(experiment.config, options=options)
    weights = weights_digest(find_checkpoint(experiment.config, settings))
    facts = {**settings.to_dict(), "cache": [[name, cache.to_dict()] for name, cache in caches.items()]}
    return Work(experiment.config, chunks, options, caches, experiment.prompts[:prompts], parts, facts, weights)


def _make_share(rank: int, world: int, reporter: Reporter, work: Work, missing: Sequence[Prompt]) -> None:
    if world > 1:
        one_thread()
    quiet_libraries()
    share = missing[rank::world]
    long_video = LONG_VIDEOS[family_of(work.config)](load_subject(work.config, options=work.options))
    if work.chunks < long_video.at_once + 2:
        raise UserError(
            f"--chunks {work.chunks} leaves nothing to compare after a first window of {long_video.at_once}; "
            f"give at least {long_video.at_once + 2}"
        )
    with reporter.stage("long videos", len(share)) as advance:
        for prompt in share:
            if parent_is_gone():
                return
            write_json(work.file(prompt), measure(long_video, prompt, work.methods))
            advance()


def measure(long_video: LongVideo, prompt: Prompt, methods: Mapping[str, MotionCacheConfig]) -> dict[str, Any]:
    """Make one prompt's video in every way, and compare each with exact, chunk by chunk.

    Returns:
        `at_once`, chunks of the first window, and `runs`: per method and history `compute_share` (FLOPs; None for a
        given history, whose clean passes are exact's) and, per chunk, `psnr_db`, `ssim` and `token_share`, the share of
        the tokens that its steps computed.
    """
    generator = long_video.subject.generator(prompt.text, prompt.seed)
    exact, given = long_video.exact_and_given(generator, methods)
    reference = to_uint8(generator.decode(exact.latents))
    flops = generator.trace_flops(exact.trace)

    def run(method: str, history: str, made: Made) -> dict[str, Any]:
        video = to_uint8(generator.decode(made.latents))
        return {
            "method": method,
            "history": history,
            "compute_share": None if history == GIVEN else generator.trace_flops(made.trace) / flops,
            **scores_by_chunk(video, reference, made.latents.shape[2] // long_video.block, long_video),
            "token_share": shares_by_chunk(made.trace, long_video),
        }

    first = next(iter(methods))
    runs = [run(name, OWN, long_video.make(generator, config)) for name, config in methods.items()]
    runs.append(run(first, FIRST, long_video.make_first(generator, methods[first])))
    runs += [run(name, GIVEN, made) for name, made in given.items()]
    return {**dataclasses.asdict(prompt), "at_once": long_video.at_once, "runs": runs}


def scores_by_chunk(
    video: np.ndarray, reference: np.ndarray, chunks: int, long_video: LongVideo
) -> dict[str, list[float]]:
    """PSNR in dB and SSIM of each chunk's frames, of two videos `[frames, height, width, 3]` uint8.

    A chunk has `block · factor` frames; the first may have fewer, where the first latent frame is a single frame.
    """
    size = long_video.block * long_video.factor
    ends = [len(video) - (chunks - 1 - chunk) * size for chunk in range(chunks)]
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    scores = {"psnr_db": metrics.psnr, "ssim": metrics.ssim}
    return {name: [round(score(video[p], reference[p]), 4) for p in parts] for name, score in scores.items()}


def shares_by_chunk(trace: Trace, long_video: LongVideo) -> list[float]:
    """Share of its tokens that each chunk of the video computed, mean over its denoising steps and guidance passes."""
    counts: dict[int, tuple[int, int]] = {}
    for record in trace.records:
        if record.role == "denoise":
            number = long_video.number(record.window, record.chunk)
            computed, total = counts.get(number, (0, 0))
            counts[number] = computed + record.tokens, total + record.tokens_total
    return [round(computed / total, 4) for _, (computed, total) in sorted(counts.items())]


def rows_of(found: Sequence[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """A row per method and history from all prompts' figures, each per chunk, with 95 % intervals over the prompts.

    `drift_db` is the mean PSNR of the later half of the chunks less that of the earlier half. The first `first` chunks
    are left out, as a grading treats them in its own way.
    """
    rows = []
    for runs in zip(*(part["runs"] for part in found), strict=True):
        psnr = np.array([run["psnr_db"] for run in runs])
        half = (first + psnr.shape[1]) // 2
        drift = psnr[:, half:].mean(axis=1) - psnr[:, first:half].mean(axis=1)
        shares = [run["compute_share"] for run in runs]
        rows.append(
            {
                "method": runs[0]["method"],
                "history": runs[0]["history"],
                "n": len(runs),
                "compute_share": None if None in shares else round(float(np.mean(shares)), 4),
                "psnr_db": _rounded(psnr.mean(axis=0)),
                "psnr_ci95": None if len(runs) < 2 else [_half_width(chunk) for chunk in psnr.T],
                "ssim": _rounded(np.mean([run["ssim"] for run in runs], axis=0)),
                "token_share": _rounded(np.mean([run["token_share"] for run in runs], axis=0)),
                "drift_db": round(float(drift.mean()), 2),
                "drift_ci95": None if len(runs) < 2 else _half_width(drift),
                "psnr_by_prompt": [run["psnr_db"] for run in runs],
            }
        )
    return rows


def _half_width(values: np.ndarray) -> float:
    return round(metrics.paired_difference(values, np.zeros(len(values))).half_width, 4)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


if __name__ == "__main__":
    sys.exit(main())
