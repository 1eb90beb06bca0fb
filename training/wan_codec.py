"""A small Wan video autoencoder."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)

from training.codec import pixels

Z_DIM = 16
INITIAL_LOG_VARIANCE = -6.0
PHASE_STARTS = (0.15, 0.3)
"""Shares of the budget at which clips grow from 5 to 9 frames and then to `LONG_CLIPS`."""
LONG_CLIPS = ((2, 17, 32), (4, 25, 24), (4, 17, 24), (2, 37, 24))
"""Batch, frames and crop of late steps, in turn: the codec's state settles only after some ten latent frames."""


def build_vae(z_dim: int = Z_DIM) -> AutoencoderKLWan:
    """Build an untrained `AutoencoderKLWan` that compresses 4x in time and 4x4 in space."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=z_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """Lay 3-D convolution weights out with channels last, which oneDNN runs about 1.5 times as fast."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model


@torch.no_grad()
def start_as_image_autoencoder(vae: AutoencoderKLWan) -> None:
    """Let every frame be coded by itself at first, as when a trained image autoencoder is inflated to video.

    The first frame of a video meets zeros where later frames meet their past, and skips the convolutions that change
    the frame rate. From random weights it gets a code unlike that of the same picture standing still, which a
    generator with relative positions can hardly tell apart. Here both codes are the same until training moves them.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, 2] *= 3**0.5  # the variance of three taps
            module.weight[:, :, :2] = 0
    for module in vae.modules():
        if not isinstance(module, WanResample) or not hasattr(module, "time_conv"):
            continue
        weight, channels = module.time_conv.weight, module.time_conv.in_channels
        weight.zero_()
        module.time_conv.bias.zero_()
        same = torch.eye(channels)
        if module.mode == "downsample3d":
            weight[:, :, 1, 0, 0] = weight[:, :, 2, 0, 0] = same / 2  # the mean of a pair of frames
        else:
            weight[:channels, :, 2, 0, 0] = weight[channels:, :, 2, 0, 0] = same  # a pair of equal frames


class WanCodec:
    """`AutoencoderKLWan` as a `training.codec.Codec`; latents are normalised by its config's mean and deviation."""

    def __init__(self, model: AutoencoderKLWan):
        self.model, self.channels = channels_last(model), model.config.z_dim

    @classmethod
    def build(cls) -> "WanCodec":
        """Return an untrained one that codes every frame by itself at first."""
        model = build_vae()
        # A posterior that starts narrow lets the decoder see the picture from the first step on.
        torch.nn.init.constant_(model.quant_conv.bias.data[Z_DIM:], INITIAL_LOG_VARIANCE)
        for module in model.modules():
            if isinstance(module, WanResidualBlock):
                torch.nn.init.zeros_(module.conv2.weight)
        for block in (module for module in model.modules() if isinstance(module, WanAttentionBlock)):
            # Trained on crops, attention over the whole picture would not carry over: it stays the identity.
            torch.nn.init.zeros_(block.proj.weight)
            torch.nn.init.zeros_(block.proj.bias)
            block.requires_grad_(False)
        start_as_image_autoencoder(model)
        return cls(model)

    @classmethod
    def load(cls, folder: Path) -> "WanCodec":
        """Return the one that was saved to a folder."""
        return cls(AutoencoderKLWan.from_pretrained(folder))

    def training_video(self, step: int, progress: float, rank: int, world: int) -> torch.Tensor:
        """Draw crops of clips: many small short ones first, for the colours, then longer and larger ones."""
        phase = sum(progress > start for start in PHASE_STARTS)
        batch, frames, crop = ((4, 5, 32), (2, 9, 32), LONG_CLIPS[step % len(LONG_CLIPS)])[phase]
        first = (step * world + rank) * 8
        rng = np.random.default_rng(first)
        size = 96 if rng.random() < 0.25 else 64
        top, left = rng.integers(0, size - crop + 1, 2)
        video = pixels("vae", list(range(first, first + batch)), frames, size, int(rng.integers(60)))
        return video[..., top : top + crop, left : left + crop]

    def posterior(self, video: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode for training: mean and log variance, each `[batch, channels, latent_frames, rows, columns]`."""
        posterior = self.model.encode(_channels_last(video)).latent_dist
        return posterior.mean, posterior.logvar

    def reconstruct(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Decode without the clamp of the stock decode, which would stop the gradient of pixels beyond."""
        vae = self.model
        vae.clear_cache()
        hidden = vae.post_quant_conv(latents)
        parts = []
        for i in range(hidden.shape[2]):
            vae._conv_idx = [0]
            parts.append(
                vae.decoder(
                    hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0
                )
            )
        vae.clear_cache()
        return torch.cat(parts, dim=2)

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a parameter is a convolution between hidden features, taken as a matrix of its kernels."""
        return "conv_in" not in name and "conv_out" not in name and "quant_conv" not in name

    @torch.no_grad()
    def measure(self, clips: int = 48, frames: int = 29, size: int = 96) -> None:
        """Measure each latent channel's mean and deviation and write them to the model's config."""
        flat = []
        for start in range(0, clips, 4):
            video = pixels("vae", list(range(start, min(start + 4, clips))), frames, size)
            flat.append(self.posterior(video.to(self.model.device), torch.Generator())[0].transpose(0, 1).flatten(1))
        flat = torch.cat(flat, dim=1)
        self.model.register_to_config(
            latents_mean=[round(v, 5) for v in flat.mean(1).tolist()],
            latents_std=[round(v, 5) for v in flat.std(1).tolist()],
        )

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encode to normalised latents `[batch, channels, latent_frames, rows, columns]`."""
        mean, std = self._statistics(video)
        return (self.model.encode(_channels_last(video)).latent_dist.mean - mean) / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents to `[batch, 3, frames, height, width]` in [-1, 1]."""
        mean, std = self._statistics(latents)
        return self.model.decode(latents * std + mean).sample

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = (self.model.config.latents_mean, self.model.config.latents_std)
        return tuple(torch.tensor(v, device=like.device).view(1, -1, 1, 1, 1) for v in values)


def _channels_last(video: torch.Tensor) -> torch.Tensor:
    return video.contiguous(memory_format=torch.channels_last_3d)
