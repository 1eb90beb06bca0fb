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
from training.generator import PHASES
from training.trainer import TrainConfig

STAGES = ("vae", "latents", "generator", "export")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(family.FAMILIES), default="skyreels")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=75, help="training time of the generator")
    parser.add_argument("--vae-minutes", type=float, help="training time of the autoencoder; default the model's own")
    parser.add_argument("--clips", type=int, default=1536, help="encoded clips of each of the two sizes")
    parser.add_argument("--pictures", type=int, default=16384, help="encoded pictures")
    parser.add_argument("--processes", type=int, default=3, help="single-threaded processes (CPU only)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("outputs/train"), help="checkpoints, encoded clips, logs")
    parser.add_argument("--output", type=Path, help="pipeline folder; default the model's own in assets/")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kind = family.FAMILIES[args.model]
    vae_minutes = kind.codec_minutes if args.vae_minutes is None else args.vae_minutes
    positive = {
        "minutes": args.minutes,
        "vae-minutes": vae_minutes,
        "clips": args.clips,
        "pictures": args.pictures,
        "processes": args.processes,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"--{name} is {value}: give a number above 0")
    cuda = args.device.startswith("cuda")
    run = family.Run(
        args.model,
        args.work,
        args.output or Path("assets") / kind.asset,
        processes=1 if cuda else args.processes,
        device=args.device,
        seed=args.seed,
    )
    stages = STAGES if args.stage == "all" else (args.stage,)
    if "vae" in stages:
        family.train_vae(
            run,
            TrainConfig(
                vae_minutes,
                kind.codec_learning_rate,
                weight_decay=0.0,
                ema_decay=0.99,
                checkpoint_minutes=2.5,
                muon=True,
            ),
        )
    if "latents" in stages:
        for phase in PHASES:
            family.encode_pool(run, phase, clips=args.clips if phase.windows else args.pictures)
    if "generator" in stages:
        family.train_generator(
            run, TrainConfig(args.minutes, 2e-3, flat=0.35, ema_decay=0.995, muon=True, autocast=cuda)
        )
    if "export" in stages:
        family.export_generator(run)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
