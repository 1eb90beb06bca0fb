"""A small MAGI-1 video autoencoder: a vision transformer that starts as the best linear code of its patches."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from magi1_motioncache.vae import AutoencoderViTMagi1
from magi1_motioncache.vae_tiling import Tiling
from training.codec import pixels

Z_DIM = 16
PATCH = 4
"""Frames, rows and columns of pixels per latent."""
COLOURS = 3
WIDTH = PATCH**3 * (COLOURS + 1)
"""One spare channel per pixel: a layer norm takes the mean and the scale away, and colours need all of theirs."""
PATCH_VALUES = PATCH**3 * COLOURS
TILE_FRAMES = 12
"""Half a second at 24 frames per second, the pipeline's tile: a chunk of three latent frames."""
TILINGS = ((12,), (12,), (12,), (8, 4), (4, 4, 4))
"""Ways to cut a tile's frames in training; a video's last tile and a given image are shorter than others."""
FIXED_LEVEL = 16.0
"""Level of the constant in the spare channels. It keeps a layer norm's divisor nearly the same for every patch."""
INITIAL_LOG_VARIANCE = -6.0


def build_vae() -> AutoencoderViTMagi1:
    """Build an untrained `AutoencoderViTMagi1` that compresses 4x in time and 4x4 in space, one block each way."""
    return AutoencoderViTMagi1(
        {
            "video_size": 16,
            "video_length": TILE_FRAMES,
            "patch_size": PATCH,
            "patch_length": PATCH,
            "z_chans": Z_DIM,
            "embed_dim": WIDTH,
            "depth": 1,
            "num_heads": 4,
            "mlp_ratio": 0.5,
        }
    )


def patches(video: Tensor) -> Tensor:
    """Cut `[batch, 3, frames, height, width]` into `[patches, 192]`, values ordered frame, row, column, colour."""
    cut = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(0, 3)


@torch.no_grad()
def start_as_linear_code(vae: AutoencoderViTMagi1, samples: Tensor) -> None:
    """Set the weights so that the model projects each patch onto its main components and back.

    The blocks start as the identity; training adds to the linear code what it lacks. Both layer norms become nearly
    linear: the spare channels hold a large constant, so that the divisor hardly depends on the patch, and minus the
    mean of the others, so that no mean is taken away. A latent channel's deviation is the root of its component's:
    all equal would spend the generator's effort on details, untouched would drown them in noise.

    Args:
        vae: a model of `build_vae`.
        samples: `[patches, 192]`, pixels of patches as `patches` cuts them.
    """
    encoder, decoder, spare = vae.encoder, vae.decoder, WIDTH - PATCH_VALUES
    mean = samples.mean(0)
    variance, components = torch.linalg.eigh(torch.cov((samples - mean).T))
    variance, components = variance.flip(0)[:Z_DIM], components.flip(1)
    gain = variance**-0.25
    sign = torch.ones(spare)
    sign[1::2] = -1

    # A stream in which the spare channels balance the mean of the others: [192, n] -> [256, n].
    def balanced(values: Tensor) -> Tensor:
        return torch.cat([values, -values.sum(0, keepdim=True).expand(spare, -1) / spare])

    level = torch.cat([torch.zeros(PATCH_VALUES), FIXED_LEVEL * sign])
    divisor = ((spare * FIXED_LEVEL**2 + samples.var(0).sum()) / WIDTH).sqrt()
    for stack in (encoder, decoder):
        # Positions in the spare channels, where they disturb nothing.
        positions = torch.randn(*stack.pos_embed.shape[:2], spare)
        stack.pos_embed.zero_()
        stack.pos_embed[..., PATCH_VALUES:] = positions - positions.mean(-1, keepdim=True)
        for block in stack.blocks:
            # Attention sees what differs between tokens, not the constant.
            weight = block.attn.qkv.weight
            weight -= (weight @ level)[:, None] * level / level.square().sum()
            for last in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    analysis = balanced(components.T)
    # Conv3d weights are ordered colour, frame, row, column.
    kernel = analysis.unflatten(1, (PATCH, PATCH, PATCH, COLOURS)).permute(0, 4, 1, 2, 3)
    encoder.patch_embed.proj.weight.copy_(kernel)
    encoder.patch_embed.proj.bias.copy_(level - analysis @ mean)
    encoder.last_layer.weight.zero_()
    encoder.last_layer.weight[torch.arange(Z_DIM), torch.arange(Z_DIM)] = gain * divisor
    encoder.last_layer.bias.zero_()
    # A posterior that starts narrow lets the decoder see the picture from the first step on.
    encoder.last_layer.bias[Z_DIM:] = INITIAL_LOG_VARIANCE

    # Channels of a pixel lie side by side in the decoder: three colours and the spare one.
    def by_pixel(values: Tensor) -> Tensor:
        colours, rest = values.split([PATCH_VALUES, spare])
        return torch.cat([colours.unflatten(0, (-1, COLOURS)), rest.unflatten(0, (-1, 1))], dim=1).flatten(0, 1)

    synthesis = balanced(components[:, :Z_DIM] / gain)
    decoder.proj_in.weight.copy_(by_pixel(synthesis))
    decoder.proj_in.bias.copy_(by_pixel(balanced(mean[:, None]) + level[:, None])[:, 0])
    decoder.norm.weight.fill_(divisor)
    decoder.pos_embed.copy_(by_pixel(decoder.pos_embed[0].T).T)
    decoder.last_layer.weight.zero_()
    decoder.last_layer.weight[torch.arange(COLOURS), torch.arange(COLOURS), 1, 1, 1] = 1
    decoder.last_layer.bias.zero_()


class ViTCodec:
    """`AutoencoderViTMagi1` as a `training.codec.Codec`; its weights themselves give normalised latents."""

    def __init__(self, model: AutoencoderViTMagi1):
        self.model, self.channels = model, model.config.ddconfig["z_chans"]
        self.tiling = Tiling(length=TILE_FRAMES)

    @classmethod
    def build(cls) -> "ViTCodec":
        """Return an untrained one that is the best linear code of 24 clips' patches."""
        model = build_vae()
        start_as_linear_code(model, patches(pixels("vae", list(range(24)), 2 * TILE_FRAMES, 96)))
        return cls(model)

    @classmethod
    def load(cls, folder: Path) -> "ViTCodec":
        """Return the one that was saved to a folder."""
        return cls(AutoencoderViTMagi1.from_pretrained(folder))

    def training_video(self, step: int, progress: float, rank: int, world: int) -> Tensor:
        """Draw one tile of clips, whole pictures: positions are learned for the extent of a picture."""
        first = (step * world + rank) * 8
        rng = np.random.default_rng(first)
        size, batch = (96, 1) if rng.random() < 0.4 else (64, 2)
        return pixels("vae", list(range(first, first + batch)), TILE_FRAMES, size, int(rng.integers(60)))

    def posterior(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode for training: mean and log variance, each `[batch, channels, latent_frames, rows, columns]`.

        The tile is cut in one way here and in another in `reconstruct`, so that latents do not depend on it.
        """
        parts = [self.model.moments(part) for part in video.split(_lengths(generator), dim=2)]
        return torch.cat(parts, dim=2).chunk(2, dim=1)

    def reconstruct(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Decode for training, in pieces drawn anew."""
        lengths = [length // PATCH for length in _lengths(generator)]
        return torch.cat([self.model.decode(part) for part in latents.split(lengths, dim=2)], dim=2)

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a parameter is a matrix of a transformer block."""
        return ".blocks." in name

    @torch.no_grad()
    def measure(self, clips: int = 48, frames: int = 2 * TILE_FRAMES, size: int = 96) -> None:
        """Shift each latent channel to zero mean and scale all channels alike to a mean square of one, in the weights.

        The decoder takes the change back. One scale for all: a channel's share of the picture stays visible in it.
        """
        video = (pixels("vae", [index], frames, size).to(self.model.device) for index in range(clips))
        latents = torch.cat([self.encode(clip).transpose(0, 1).flatten(1) for clip in video], dim=1)
        mean = latents.mean(1)
        scale = (latents - mean[:, None]).square().mean().sqrt()
        last, first = self.model.encoder.last_layer, self.model.decoder.proj_in
        first.bias += first.weight @ mean
        first.weight *= scale
        last.bias[:Z_DIM] = (last.bias[:Z_DIM] - mean) / scale
        last.weight[:Z_DIM] /= scale

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode in the pipeline's tiles: `[batch, channels, latent_frames, rows, columns]`."""
        return self.model.tiled_encode(video, self.tiling)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode in the pipeline's tiles: `[batch, 3, frames, height, width]`, about [-1, 1]."""
        return self.model.tiled_decode(latents, self.tiling)


def _lengths(generator: torch.Generator) -> list[int]:
    return list(TILINGS[int(torch.randint(len(TILINGS), (), generator=generator))])
