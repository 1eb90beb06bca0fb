"""The stages of making one model of `assets/`: autoencoder, encoded clips, generator, export.

Another model joins by adding a `Family` to `FAMILIES`: its autoencoder, its task, its export; the stages stay the same.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from training import export, latents, parallel
from training.codec import Codec, ReconstructionTask, reconstruction_psnr
from training.generator import PHASES, GeneratorTask, Phase
from training.magi import SAMPLING, Magi1Task
from training.skyreels import SkyReelsTask
from training.trainer import TrainConfig, train
from training.vit_codec import ViTCodec
from training.wan_codec import WanCodec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What makes one model different from another, for the stages."""

    asset: str
    """Name of its folder in `assets/`."""
    codec: type[Codec]
    codec_learning_rate: float
    codec_minutes: float
    """How long its autoencoder is trained if nothing else is asked for."""
    frames: dict[str, int]
    """Frames to encode of each phase's clips."""
    task: Callable[[Codec, Path, str], GeneratorTask]
    export: Callable[[Path, GeneratorTask, nn.Module, Codec], None]
    """Writes (folder, task, EMA model, autoencoder)."""


FAMILIES: dict[str, Family] = {
    "skyreels": Family(
        asset="skyreels-v2-tiny",
        codec=WanCodec,
        codec_learning_rate=2e-3,
        codec_minutes=14,
        frames={"pictures": 1, "small": 45, "full": 61},
        task=lambda codec, pool, device: SkyReelsTask(codec.channels, pool, device=device),
        export=lambda folder, task, ema, codec: export.export_skyreels(folder, ema, task.tokenizer, codec.model),
    ),
    "magi": Family(
        asset="magi1-tiny",
        codec=ViTCodec,
        codec_learning_rate=2e-4,
        codec_minutes=6,
        frames={"pictures": 4, "small": 48, "full": 60},
        task=lambda codec, pool, device: Magi1Task(codec.channels, pool, device=device),
        export=lambda folder, task, ema, codec: export.export_magi(folder, ema, task.tokenizer, codec.model, SAMPLING),
    ),
}


@dataclass(frozen=True)
class Run:
    """One run of the stages."""

    family: str
    work: Path
    output: Path
    processes: int = 1
    device: str = "cpu"
    seed: int = 0

    @property
    def vae_folder(self) -> Path:
        """Where the trained autoencoder lies."""
        return self.work / "vae"

    @property
    def pool_folder(self) -> Path:
        """Where encoded clips lie."""
        return self.work / "latents"


def train_vae(run: Run, config: TrainConfig) -> None:
    """Train the autoencoder, measure its latents and save it to `run.vae_folder`."""
    parallel.launch(_vae_worker, run.processes, run, config)


def _vae_worker(rank: int, run: Run, config: TrainConfig) -> None:
    torch.manual_seed(run.seed)
    kind = FAMILIES[run.family].codec
    task = ReconstructionTask(kind.build(), run.device)
    torch.manual_seed(run.seed + 1 + rank)
    codec = kind(train(task, config, run.work, "vae", rank))
    if rank == 0:
        codec.measure()
        codec.model.save_pretrained(run.vae_folder)
        psnr = reconstruction_psnr(codec, frames=FAMILIES[run.family].frames["small"])
        logger.info("autoencoder: %.2f dB", sum(psnr) / len(psnr))


def encode_pool(run: Run, phase: Phase, clips: int, shard_clips: int = 64) -> None:
    """Encode one phase's clips with the trained autoencoder, in shards; finished shards are kept."""
    parallel.launch(_encode_worker, run.processes, run, phase, -(-clips // shard_clips), shard_clips)


def _encode_worker(rank: int, run: Run, phase: Phase, shards: int, shard_clips: int) -> None:
    family = FAMILIES[run.family]
    codec, folder = family.codec.load(run.vae_folder), run.pool_folder / phase.pool
    for shard in range(rank, shards, parallel.world_size()):
        latents.encode_shard(codec, folder, shard, shard_clips, family.frames[phase.pool], phase.size, run.device)


def train_generator(run: Run, config: TrainConfig) -> None:
    """Train text encoder and transformer; every checkpoint is exported to `run.output`.

    Raises:
        UserError: if there are no encoded clips for a phase.
    """
    for phase in PHASES:
        if not any((run.pool_folder / phase.pool).glob("*.pt")):
            raise UserError(f"no encoded clips in {run.pool_folder / phase.pool}: run --stage latents first")
    parallel.launch(_generator_worker, run.processes, run, config)


def _generator_worker(rank: int, run: Run, config: TrainConfig) -> None:
    family = FAMILIES[run.family]
    torch.manual_seed(run.seed)
    task = family.task(family.codec.load(run.vae_folder), run.pool_folder, run.device)

    def on_checkpoint(ema: nn.Module, record: dict) -> None:
        _export(run, task, ema)
        logger.info("exported %s at step %d, %.1f min", run.output, record["step"], record["minutes"])

    train(task, config, run.work, run.family, rank, on_checkpoint)


def export_generator(run: Run) -> None:
    """Export the last checkpoint's EMA weights with the autoencoder as it is now.

    Raises:
        UserError: if nothing was trained yet.
    """
    checkpoint = run.work / f"{run.family}.pt"
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist: train the generator first, with --stage generator")
    family = FAMILIES[run.family]
    task = family.task(family.codec.load(run.vae_folder), run.pool_folder, "cpu")
    task.model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    _export(run, task, task.model)


def _export(run: Run, task: GeneratorTask, model: nn.Module) -> None:
    family = FAMILIES[run.family]
    family.export(run.output, task, model, family.codec.load(run.vae_folder))
    _write_log(run)


def _write_log(run: Run) -> None:
    """Write the stages' logs into one file beside the weights, each line with the name of its stage."""
    lines = []
    for stage in ("vae", run.family):
        log = run.work / f"{stage}.jsonl"
        if log.exists():
            name = "generator" if stage == run.family else stage
            lines += [json.dumps({"stage": name, **json.loads(line)}) for line in log.read_text().splitlines()]
    (run.output / "training_log.jsonl").write_text("".join(line + "\n" for line in lines))
