"""A small Wan video autoencoder, trained on procedural clips."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)

from training import procedural

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


def pixels(split: str, indices: list[int], frames: int, size: int, start: int = 0) -> torch.Tensor:
    """Render clips for the autoencoder: `[batch, 3, frames, size, size]` float32 in [-1, 1]."""
    clips = [torch.from_numpy(procedural.clip(split, i, frames, size, start)[0]) for i in indices]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).mul(2).sub(1)


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


class VaeTask:
    """Reconstruction (L1 and L2) with a light pull of the posterior towards a normal distribution."""

    phase_starts = PHASE_STARTS

    def __init__(self, z_dim: int = Z_DIM, kl_weight: float = 2e-4, device: str = "cpu"):
        self.model = channels_last(build_vae(z_dim)).to(device)
        # A posterior that starts narrow lets the decoder see the picture from the first step on.
        torch.nn.init.constant_(self.model.quant_conv.bias.data[z_dim:], INITIAL_LOG_VARIANCE)
        for module in self.model.modules():
            if isinstance(module, WanResidualBlock):
                torch.nn.init.zeros_(module.conv2.weight)
            if isinstance(module, WanAttentionBlock):
                # Trained on crops, attention over the whole picture would not carry over: it stays the identity.
                torch.nn.init.zeros_(module.proj.weight)
                torch.nn.init.zeros_(module.proj.bias)
                module.requires_grad_(False)
        start_as_image_autoencoder(self.model)
        self.kl_weight, self.device = kl_weight, device

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a parameter is a convolution between hidden features, taken as a matrix of its kernels."""
        return "conv_in" not in name and "conv_out" not in name and "quant_conv" not in name

    def loss(self, step: int, progress: float, rank: int, world: int) -> torch.Tensor:
        """Reconstruct crops of clips: many small short ones first, for the colours, then longer and larger ones."""
        phase = sum(progress > start for start in self.phase_starts)
        batch, frames, crop = ((4, 5, 32), (2, 9, 32), LONG_CLIPS[step % len(LONG_CLIPS)])[phase]
        first = (step * world + rank) * 8
        rng = np.random.default_rng(first)
        size = 96 if rng.random() < 0.25 else 64
        top, left = rng.integers(0, size - crop + 1, 2)
        video = pixels("vae", list(range(first, first + batch)), frames, size, int(rng.integers(60))).to(self.device)
        video = video[..., top : top + crop, left : left + crop]
        video = video.contiguous(memory_format=torch.channels_last_3d)
        posterior = self.model.encode(video).latent_dist
        # The stock decode clamps to [-1, 1], which would stop the gradient of pixels beyond.
        error = _decode_unclamped(self.model, posterior.sample()) - video
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        return error.abs().mean() + 5 * error.square().mean() + self.kl_weight * kl.mean()


class DecoderTask(VaeTask):
    """Further training of the decoder alone: the latents, and so a generator trained on them, stay valid."""

    phase_starts = (-1.0, -1.0)

    def __init__(self, vae: AutoencoderKLWan, device: str = "cpu"):
        self.model = channels_last(vae).to(device)
        self.kl_weight, self.device = 0.0, device
        for part in (vae.encoder, vae.quant_conv, *(m for m in vae.modules() if isinstance(m, WanAttentionBlock))):
            part.requires_grad_(False)


def _decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    parts = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(parts, dim=2)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: int = 4, frames: int = 45, size: int = 96) -> list[float]:
    """Return the PSNR in dB of each of the first held-out clips, encoded to the mean and decoded again."""
    video = pixels("heldout", list(range(clips)), frames, size)
    output = vae.decode(vae.encode(video).latent_dist.mean).sample
    return (-10 * torch.log10((output - video).square().mean((1, 2, 3, 4)) / 4)).tolist()


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: int = 48, frames: int = 29, size: int = 96) -> None:
    """Measure each latent channel's mean and deviation and write them to the model's config."""
    batches = [list(range(start, min(start + 4, clips))) for start in range(0, clips, 4)]
    latents = torch.cat([vae.encode(pixels("vae", batch, frames, size)).latent_dist.mean for batch in batches])
    flat = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in flat.mean(1).tolist()],
        latents_std=[round(v, 5) for v in flat.std(1).tolist()],
    )
