"""The stages of making one model of `assets/`: autoencoder, encoded clips, generator, export.

Another model joins by adding a `Family` to `FAMILIES`: its autoencoder, its task, its export; the stages stay the same.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from common.errors import UserError
from training import export, latents, parallel
from training import vae as autoencoder
from training.skyreels import SkyReelsTask
from training.trainer import Task, TrainConfig, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What makes one model different from another, for the stages."""

    vae_task: Callable[[str], Task]
    task: Callable[[nn.Module, Path, str], Task]
    export: Callable[[Path, Task, nn.Module, nn.Module], None]
    """Writes (folder, task, EMA model, autoencoder)."""


FAMILIES: dict[str, Family] = {
    "skyreels": Family(
        vae_task=lambda device: autoencoder.VaeTask(device=device),
        task=lambda vae, pool, device: SkyReelsTask(vae.config.z_dim, pool, device=device),
        export=lambda folder, task, ema, vae: export.export_skyreels(folder, ema, task.tokenizer, vae),
    )
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
    task = FAMILIES[run.family].vae_task(run.device)
    torch.manual_seed(run.seed + 1 + rank)
    vae = train(task, config, run.work, "vae", rank)
    if rank == 0:
        autoencoder.measure_latents(vae)
        vae.save_pretrained(run.vae_folder)


def train_decoder(run: Run, config: TrainConfig) -> None:
    """Train the saved autoencoder's decoder further; the next export of the generator picks it up."""
    parallel.launch(_decoder_worker, run.processes, run, config)


def _decoder_worker(rank: int, run: Run, config: TrainConfig) -> None:
    torch.manual_seed(run.seed + 100 + rank)

    def on_checkpoint(ema: nn.Module, record: dict) -> None:
        ema.save_pretrained(run.vae_folder)
        psnr = autoencoder.reconstruction_psnr(ema)
        logger.info("decoder step %d: %.2f dB", record["step"], sum(psnr) / len(psnr))

    task = autoencoder.DecoderTask(AutoencoderKLWan.from_pretrained(run.vae_folder), run.device)
    train(task, config, run.work, "decoder", rank, on_checkpoint)


def encode_pool(run: Run, size: int, frames: int, clips: int, shard_clips: int = 64) -> None:
    """Encode clips of one size with the trained autoencoder, in shards; finished shards are kept."""
    parallel.launch(_encode_worker, run.processes, run, size, frames, -(-clips // shard_clips), shard_clips)


def _encode_worker(rank: int, run: Run, size: int, frames: int, shards: int, shard_clips: int) -> None:
    vae = AutoencoderKLWan.from_pretrained(run.vae_folder)
    for shard in range(rank, shards, parallel.world_size()):
        latents.encode_shard(vae, run.pool_folder, shard, shard_clips, frames, size, run.device)


def train_generator(run: Run, config: TrainConfig) -> None:
    """Train text encoder and transformer; every checkpoint is exported to `run.output`."""
    parallel.launch(_generator_worker, run.processes, run, config)


def _generator_worker(rank: int, run: Run, config: TrainConfig) -> None:
    family = FAMILIES[run.family]
    torch.manual_seed(run.seed)
    vae = AutoencoderKLWan.from_pretrained(run.vae_folder)
    task = family.task(vae, run.pool_folder, run.device)

    def on_checkpoint(ema: nn.Module, record: dict) -> None:
        # Read again: the decoder may have been trained further meanwhile.
        family.export(run.output, task, ema, AutoencoderKLWan.from_pretrained(run.vae_folder))
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
    vae = AutoencoderKLWan.from_pretrained(run.vae_folder)
    task = family.task(vae, run.pool_folder, "cpu")
    task.model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    family.export(run.output, task, task.model, vae)
