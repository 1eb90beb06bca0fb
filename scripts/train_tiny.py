"""Train a small checkpoint of `assets/` from nothing, on procedural video.

    python scripts/train_tiny.py --model skyreels --minutes 75 --processes 3

makes the autoencoder, encodes clips, trains the generator and writes the pipeline folder. A run that was stopped goes
on where it was when the same command is given again. Stages can be run alone with --stage.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, count, number, run_command, whole_number
from common.devices import resolve_device
from common.errors import UserError
from training import family
from training.generator import PHASES
from training.trainer import TrainConfig

STAGES = ("vae", "latents", "generator", "export")


def parser() -> Parser:
    made = Parser("python scripts/train_tiny.py", __doc__)
    made.add_argument("--model", choices=sorted(family.FAMILIES), default="skyreels", help="which to train (skyreels)")
    made.add_argument("--stage", choices=("all", *STAGES), default="all", help="one part of the work alone (all)")
    made.add_argument(
        "--minutes", type=number, default=75, metavar="X", help="training time of the generator, in minutes (75)"
    )
    made.add_argument(
        "--vae-minutes", type=number, metavar="X", help="training time of the autoencoder, in minutes (the model's own)"
    )
    made.add_argument(
        "--clips", type=count, default=1536, metavar="N", help="clips to encode, of each of the two sizes (1536)"
    )
    made.add_argument("--pictures", type=count, default=16384, metavar="N", help="pictures to encode (16384)")
    made.add_argument(
        "--processes", type=count, default=3, metavar="N", help="processes of one thread each, on a CPU (3)"
    )
    made.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    made.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/train"),
        metavar="DIR",
        help="for checkpoints, encoded clips and logs (outputs/train)",
    )
    made.add_argument(
        "--output", type=Path, metavar="DIR", help="pipeline folder to write (the model's own in assets/)"
    )
    made.add_argument("--seed", type=whole_number, default=0, metavar="N", help="of weights and batches (0)")
    return made


def main() -> None:
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kind = family.FAMILIES[args.model]
    vae_minutes = kind.codec_minutes if args.vae_minutes is None else args.vae_minutes
    for name, minutes in (("--minutes", args.minutes), ("--vae-minutes", vae_minutes)):
        if minutes <= 0:
            raise UserError(f"{name}: {minutes:g} is not allowed; give a number above 0")
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    run = family.Run(
        args.model,
        args.work,
        args.output or Path("assets") / kind.asset,
        processes=1 if cuda else args.processes,
        device=str(device),
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
    sys.exit(run_command(main))
