"""The command line: `python -m magi1_motioncache`, or `bash scripts/run_magi.sh`."""

from __future__ import annotations

from collections.abc import Sequence

from common.cli import Parser, add_run_options, generate_command, number
from magi1_motioncache.settings import FILES

PROG = "bash scripts/run_magi.sh"
DESCRIPTION = """\
Generate a video with MAGI-1 and MotionCache, and compare it with exact execution.

Without options: the tiny checkpoint of this repository, exact and MotionCache-slow from one seed, on a CPU in under
three minutes. Ends with a table of what was computed, and writes video.mp4, exact.mp4, side_by_side.mp4, motion.png,
trace.json and summary.json. video.mp4 and exact.mp4 grow by each chunk as soon as it is clean, and can be watched at
any time; Ctrl-C leaves what they hold.

No library ships MAGI-1, so there is no stock pipeline to compare with: exact is the reference."""
EPILOG = """\
examples:
  another prompt, faster, without the comparison
    bash scripts/run_magi.sh --prompt "a blue star moving left over a checkered beige background" \\
        --preset fast --no-compare

  MAGI-1 4.5B distilled at 720x720 on a GPU of 24 GB: text encoder and K/V cache wait in main memory (64 GB)
    bash scripts/run_magi.sh --config configs/magi1_4.5b_distill_slow.yaml --model models/magi1-4.5b-distill \\
        --offload model --set cache.state_device=cpu --prompt "a cat walks along a garden wall at sunset"

  the same on a GPU of 80 GB, everything on it
    bash scripts/run_magi.sh --config configs/magi1_4.5b_distill_slow.yaml --model models/magi1-4.5b-distill

  MAGI-1 24B distilled at 720x1280 on a GPU of 80 GB: text encoder and K/V cache wait in main memory (128 GB)
    bash scripts/run_magi.sh --config configs/magi1_24b_distill_slow.yaml --model models/magi1-24b-distill \\
        --offload model --set cache.state_device=cpu

  start from an image, or continue a video from its last frames
    bash scripts/run_magi.sh --mode i2v --image first.png
    bash scripts/run_magi.sh --mode v2v --video clip.mp4

docs/magi1.md tells how to fetch and convert the weights.

Exit codes: 0 done, 2 bad input (one line says what is allowed), 130 interrupted."""


def build_parser() -> Parser:
    """The command's options; those left out keep what the YAML file says."""
    parser = Parser(PROG, DESCRIPTION, EPILOG, usage=f"{PROG} [options]")
    groups = add_run_options(
        parser,
        frames="in whole chunks",
        model="folder that magi1_motioncache.convert wrote, or ckpt/magi/<variant>; its name chooses the --config",
        without="no exact, no quality",
    )
    groups.what.add_argument("--mode", metavar="MODE", help="t2v, i2v or v2v (default: by --image and --video)")
    groups.how.add_argument(
        "--guidance-scale", type=number, metavar="X", help="strength of the text, for models that are not distilled"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def load_job() -> type:
        from magi1_motioncache.job import Magi1Job

        return Magi1Job

    return generate_command(build_parser(), FILES, load_job, argv)
