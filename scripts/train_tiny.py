"""Train a small checkpoint of `assets/` from nothing, on procedural video.

    python scripts/train_tiny.py --model skyreels --minutes 75 --processes 3

makes the autoencoder, encodes clips, trains the generator and writes the pipeline folder. A run that was stopped goes
on where it was when the same command is given again. Stages can be run alone with --stage.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import UserError
from training import family
from training.trainer import TrainConfig

STAGES = ("vae", "latents", "generator", "decoder", "export")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(family.FAMILIES), default="skyreels")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=75, help="training time of the generator")
    parser.add_argument("--vae-minutes", type=float, default=20, help="training time of the autoencoder")
    parser.add_argument("--decoder-minutes", type=float, default=30, help="further training of its decoder alone")
    parser.add_argument("--clips", type=int, default=2048, help="encoded clips of each size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="sizes to encode, in pixels")
    parser.add_argument("--processes", type=int, default=3, help="single-threaded processes (CPU only)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("outputs/train"), help="checkpoints, encoded clips, logs")
    parser.add_argument("--output", type=Path, help="pipeline folder; default assets/<name of the model>")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("minutes", "vae_minutes", "decoder_minutes", "clips", "processes"):
        if getattr(args, name) <= 0:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(args, name)}: give a number above 0")
    cuda = args.device.startswith("cuda")
    run = family.Run(
        args.model,
        args.work,
        args.output or Path("assets") / f"{args.model}-v2-tiny",
        processes=1 if cuda else args.processes,
        device=args.device,
        seed=args.seed,
    )
    stages = STAGES if args.stage == "all" else (args.stage,)
    if "vae" in stages:
        family.train_vae(
            run,
            TrainConfig(args.vae_minutes, 2e-3, weight_decay=0.0, ema_decay=0.99, checkpoint_minutes=2.5, muon=True),
        )
    if "latents" in stages:
        for size in args.sizes:
            family.encode_pool(run, size, frames=45 if size == 64 else 61, clips=args.clips)
    if "generator" in stages:
        family.train_generator(
            run, TrainConfig(args.minutes, 2e-3, flat=0.35, ema_decay=0.995, muon=True, autocast=cuda)
        )
    if "decoder" in stages:
        family.train_decoder(run, TrainConfig(args.decoder_minutes, 5e-4, weight_decay=0.0, ema_decay=0.99, muon=True))
    if "export" in stages:
        family.export_generator(run)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
