"""The command line: `python -m skyreels_v2_motioncache`, or `bash scripts/run_skyreels.sh`."""

from __future__ import annotations

from collections.abc import Sequence

from common.cli import Parser, add_run_options, generate_command, number
from skyreels_v2_motioncache.settings import FILES

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
    parser = Parser(PROG, DESCRIPTION, EPILOG, usage=f"{PROG} [options]")
    groups = add_run_options(
        parser,
        frames="4k + 1",
        model="folder in the diffusers layout, or a hub repository; its name chooses the --config",
        without="no stock, no exact, no quality",
    )
    groups.what.add_argument("--negative-prompt", metavar="TEXT", help="what the video keeps away from")
    groups.how.add_argument(
        "--guidance-scale", type=number, metavar="X", help="classifier-free guidance; 1 turns it off"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def load_job() -> type:
        from skyreels_v2_motioncache.job import SkyReelsJob

        return SkyReelsJob

    return generate_command(build_parser(), FILES, load_job, argv)
