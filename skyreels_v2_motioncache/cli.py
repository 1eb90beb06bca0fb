"""The command line: `python -m skyreels_v2_motioncache`, or `bash scripts/run_skyreels.sh`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, number, parse_assignment, run_command, whole_number
from skyreels_v2_motioncache.settings import PRESETS, load_settings, method_name

PROG = "bash scripts/run_skyreels.sh"
DESCRIPTION = """\
Generate a video with SkyReels-V2 and MotionCache, and compare it with exact execution.

Without options: the tiny checkpoint of this repository, stock, exact and MotionCache-slow from one seed, on a CPU in
under three minutes. Ends with a table of what was computed, and writes video.mp4, exact.mp4, side_by_side.mp4,
motion.png, trace.json and summary.json."""
EPILOG = """\
examples:
  another prompt, faster, without the comparison
    bash scripts/run_skyreels.sh --prompt "a blue star moving left over a checkered beige background" \\
        --preset fast --no-compare

  SkyReels-V2 1.3B at 540P on a GPU of 24 GB: parts of the model and the K/V cache wait in main memory (64 GB)
    bash scripts/run_skyreels.sh --config configs/skyreels_v2_1.3b_540p_slow.yaml --offload model \\
        --set cache.state_device=cpu --prompt "a cat walks along a garden wall at sunset"

  the same on a GPU of 80 GB, everything on it
    bash scripts/run_skyreels.sh --config configs/skyreels_v2_1.3b_540p_slow.yaml

  SkyReels-V2 14B at 540P on a GPU of 80 GB: its K/V cache (84 GB) waits in main memory (192 GB)
    bash scripts/run_skyreels.sh --config configs/skyreels_v2_14b_540p_slow.yaml --offload model \\
        --set cache.state_device=cpu

  continue a video, or start from an image
    bash scripts/run_skyreels.sh --video clip.mp4 --num-frames 45
    bash scripts/run_skyreels.sh --image first.png

Exit codes: 0 done, 2 bad input (one line says what is allowed), 130 interrupted."""


def build_parser() -> Parser:
    """The command's options; those left out keep what the YAML file says."""
    parser = Parser(PROG, DESCRIPTION, EPILOG)
    what = parser.add_argument_group("what to show")
    what.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what it keeps away from")
    what.add_argument("--image", metavar="FILE", help="picture that the video starts with")
    what.add_argument("--video", metavar="FILE", help="video to continue; --num-frames counts its overlap")
    what.add_argument("--num-frames", type=whole_number, metavar="N", help="frames of the whole video, 4k + 1")
    what.add_argument("--height", type=whole_number, metavar="N", help="pixels, a multiple of 16")
    what.add_argument("--width", type=whole_number, metavar="N", help="pixels, a multiple of 16")
    what.add_argument("--seed", type=whole_number, metavar="N", help="seed of the noise")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: slow)")
    how.add_argument("--config", type=Path, metavar="FILE", help="YAML file of all settings, see configs/")
    how.add_argument("--model", metavar="ID_OR_PATH", help="folder in the diffusers layout, or a hub repository")
    how.add_argument("--steps", type=whole_number, metavar="N", help="denoising steps")
    how.add_argument("--guidance-scale", type=number, metavar="X", help="classifier-free guidance; 1 turns it off")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of the YAML file, such as cache.threshold=0.15; may be repeated",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for results (outputs/<time>-<model>-<method>)"
    )
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    where.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16")
    where.add_argument("--offload", metavar="HOW", help="none, model or group")
    where.add_argument("--no-compare", action="store_true", help="only the method: no stock, no exact, no quality")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _main(arguments))


def _main(arguments: list[str]) -> None:
    args = build_parser().parse_args(arguments)
    options = _options(args)
    settings, config = load_settings(args.config, args.preset, args.model, options)
    method = method_name(settings, config, args.preset, options)
    # Only now, so that --help and a mistyped option answer without waiting for the model's libraries.
    from skyreels_v2_motioncache.job import Job

    command = shlex.join([*PROG.split(), *arguments])
    Job(settings, method, config, args.output, command, compare=not args.no_compare).run()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = "prompt negative_prompt image video num_frames height width seed steps guidance_scale device dtype offload"
    given = {name: getattr(args, name) for name in names.split() if getattr(args, name) is not None}
    return {**given, **dict(parse_assignment(text) for text in args.set)}
