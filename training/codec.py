"""What the stages need of an autoencoder, and its training: reconstruction of procedural clips."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training import procedural

KL_WEIGHT = 2e-4


class Codec(Protocol):
    """A video autoencoder of one architecture."""

    model: nn.Module
    """Its weights; has diffusers' `save_pretrained`."""
    channels: int
    """Channels of a latent."""

    @classmethod
    def build(cls) -> "Codec":
        """Return an untrained one."""

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Return the one that was saved to a folder."""

    def training_video(self, step: int, progress: float, rank: int, world: int) -> Tensor:
        """Draw this process's batch of a step: `[batch, 3, frames, height, width]` in [-1, 1]."""

    def posterior(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode for training: mean and log variance, each `[batch, channels, latent_frames, rows, columns]`."""

    def reconstruct(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Decode for training: frames that are not clamped, so that each has a gradient."""

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a parameter is a matrix or kernel between hidden features."""

    def measure(self) -> None:
        """Bring latents to about zero mean and unit scale, for the generator, from now on."""

    def encode(self, video: Tensor) -> Tensor:
        """Encode as the pipeline does: the posterior's mean, scaled for the generator."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents as the pipeline does."""


def pixels(split: str, indices: list[int], frames: int, size: int, start: int = 0) -> Tensor:
    """Render clips for the autoencoder: `[batch, 3, frames, size, size]` float32 in [-1, 1]."""
    clips = [torch.from_numpy(procedural.clip(split, i, frames, size, start)[0]) for i in indices]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).mul(2).sub(1)


class ReconstructionTask:
    """Reconstruction (L1 and L2) with a light pull of the posterior towards a normal distribution.

    Args:
        codec: the autoencoder.
        device: where to train it.
    """

    def __init__(self, codec: Codec, device: str = "cpu"):
        self.codec, self.device = codec, device
        self.model = codec.model.to(device)

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether Muon may train this parameter."""
        return self.codec.is_hidden_matrix(name)

    def loss(self, step: int, progress: float, rank: int, world: int) -> Tensor:
        """Reconstruct this process's clips of a step."""
        video = self.codec.training_video(step, progress, rank, world).to(self.device)
        generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + rank)
        mean, log_variance = self.codec.posterior(video, generator)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        error = self.codec.reconstruct(mean + (0.5 * log_variance).exp() * noise, generator) - video
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return error.abs().mean() + 5 * error.square().mean() + KL_WEIGHT * kl.mean()


@torch.no_grad()
def reconstruction_psnr(codec: Codec, frames: int, clips: int = 4, size: int = 96) -> list[float]:
    """Return the PSNR in dB of each of the first held-out clips, encoded and decoded again."""
    video = pixels("heldout", list(range(clips)), frames, size).to(next(codec.model.parameters()).device)
    output = codec.decode(codec.encode(video)).clamp(-1, 1)
    return (-10 * torch.log10((output - video).square().mean((1, 2, 3, 4)) / 4)).tolist()
