"""Peak GPU memory, kernels and waits of the host at full size, counted without a GPU.

    python -m benchmarks.memory

The real code denoises on PyTorch's meta device, where tensors have sizes and no values: SkyReels-V2 1.3B at 544×960 and
97 frames with the library's own forward, exact and cached, and MAGI-1 4.5B at 720×720. Nothing is downloaded and
nothing is timed. `docs/memory.md` says what is counted and what is not.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median_high
from typing import Any

import torch

from benchmarks.speed.counted import Counted, count_session
from benchmarks.speed.magi import Magi, PartialPlan
from benchmarks.speed.skyreels import SkyReels
from benchmarks.speed.subject import WHOLE, Mode, Subject
from benchmarks.subject import load_settings
from common.cache import MotionCacheConfig
from common.checks import check_range
from common.cli import Parser, count, run_command
from common.files import make_output_folder, write_json
from common.results import provenance
from magi1_motioncache.plan import ChunkCall

logger = logging.getLogger("memory")
ROOT = Path(__file__).resolve().parents[1]
META = torch.device("meta")
CONFIGS = {"skyreels": "skyreels_v2_1.3b_540p", "magi": "magi1_4.5b_distill"}
BUDGET = 0.25
LARGEST_STEP = 8
"""Most iterations that one may stand for: beyond, chunks would have too few steps to come to all their phases."""


@dataclass(frozen=True)
class ThinnedPlan(PartialPlan):
    """Every so many iterations of each stage; the first, which makes the last chunk's K/V final, always."""

    every: int = 1

    def iterations(self) -> Iterator[tuple[ChunkCall, ...]]:
        stage = self.config.steps_per_stage
        return (calls for i, calls in enumerate(super().iterations()) if i % stage % self.every == 0)


class ThinnedMagi(Magi):
    """A video of MAGI-1 of which some iterations are left out; in those that are run each chunk is as far as it was."""

    def __init__(self, size: str, every: int) -> None:
        self._every = every
        super().__init__(size, META)

    def _video(self, part: slice = WHOLE) -> ThinnedPlan:
        plan = super()._video(part)
        return ThinnedPlan(plan.config, plan.num_chunks, part=part, every=self._every)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "benchmarks.memory", *arguments])
    return run_command(lambda: _run(_parser().parse_args(arguments), command))


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="which (both)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny to try it out (full)")
    parser.add_argument(
        "--every", type=count, default=3, metavar="N", help="count every Nth iteration of a video, up to 8 (3)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results/memory.json", metavar="FILE", help="file (results/memory.json)"
    )
    return parser


def _run(args: argparse.Namespace, command: str) -> None:
    check_range("--every", args.every, 1, LARGEST_STEP)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_output_folder(args.output.parent)
    head, rows = provenance(command), []
    for name in args.models:
        subject, iterations = load(name, args.size, args.every)
        for mode in modes(subject, CONFIGS[name]):
            rows.append(row(subject, mode, count_session(subject, mode, iterations)))
            logger.info("%s, %s: %.1f GiB", subject.name, mode.name, rows[-1]["peak_bytes"] / 2**30)
            write_json(args.output, {**head, "size": args.size, "every": args.every, "rows": rows})


def load(name: str, size: str, every: int) -> tuple[Subject, slice]:
    """A model without values, and the iterations of its video to count: every so many.

    Args:
        name: `"skyreels"` or `"magi"`.
        size: `"full"` or `"tiny"`.
        every: how many iterations of the video one stands for.
    """
    return (SkyReels(size, META), slice(0, None, every)) if name == "skyreels" else (ThinnedMagi(size, every), WHOLE)


def modes(subject: Subject, config: str) -> list[Mode]:
    """The library's own forward where there is one, exact, and cached; K/V on the GPU, in 8 bits, in main memory.

    Args:
        subject: to be denoised.
        config: name of a model in `configs/`. Its `slow` and `best` get a budget, which decides without values, and one
            step of warm-up, so that few iterations reach the phase in which tokens are chosen.
    """

    def settings(preset: str) -> MotionCacheConfig:
        cached = load_settings(ROOT / f"configs/{config}_{preset}.yaml").cache
        return cached.replace(budget=BUDGET, warmup_steps=1, chunk_phase=0)

    found = [Mode("stock", None)] if subject.has_stock else []
    cached = {f"budget {BUDGET:g}": settings("slow"), "best": settings("best")}
    configs = {"exact": MotionCacheConfig.preset("exact"), **cached}
    found += [Mode(name, config) for name, config in configs.items()]
    found += [Mode(f"{name}, kv_dtype int8", config.replace(kv_dtype="int8")) for name, config in cached.items()]
    return found + [
        Mode(f"{name}, state_device cpu", config.replace(state_device="cpu")) for name, config in configs.items()
    ]


def row(subject: Subject, mode: Mode, counted: Counted) -> dict[str, Any]:
    """One line of the table.

    Returns:
        `model`, `mode`; at the peak `peak_bytes`, and of it `weights_bytes`, `kv_bytes`, `values_bytes` (cached values
        and what decisions are made from) and `rest_bytes`; the middle iteration's `waits` inside forwards and
        `loop_waits`, and `most_waits` of any but the first; the mean iteration's `kernels`, `moved_bytes` (of kernels
        other than matrix products and attention) and `copied_bytes` (between host and GPU); and for
        reading: `places` and `loop_places` that wait, and the `largest_bytes` of tensors at the peak.
    """
    parts = counted.peak.parts
    named = {
        "weights": parts["weights"],
        "kv": parts.get("kv", 0),
        "values": parts.get("values", 0) + parts.get("signals", 0),
    }
    sizes = {"peak": counted.peak.bytes, **named, "rest": counted.peak.bytes - sum(named.values())}
    later = counted.iterations[1:]  # the first one includes what comes before the loop

    return {
        "model": subject.name,
        "mode": mode.name,
        **{f"{part}_bytes": size for part, size in sizes.items()},
        "waits": median_high(i.waits for i in later),
        "most_waits": max(i.waits for i in later),
        "loop_waits": median_high(i.loop_waits for i in later),
        "kernels": round(mean(i.kernels for i in later)),
        "moved_bytes": round(mean(i.moved for i in later)),
        "copied_bytes": round(mean(i.copied for i in later)),
        "iterations": len(counted.iterations),
        "places": dict(counted.waits.most_common()),
        "loop_places": dict(counted.loop_waits.most_common()),
        "largest_bytes": counted.peak.largest,
    }


if __name__ == "__main__":
    sys.exit(main())
