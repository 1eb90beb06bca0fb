"""The MAGI-1 video autoencoder."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from common.errors import UserError
from magi1_motioncache.vae_blocks import Decoder, Encoder
from magi1_motioncache.vae_tiling import Axis, Tiling, run_tiled

# Variants that the published autoencoder does not use.
FIXED = {
    "use_rope": False,
    "use_final_proj": False,
    "norm_code": False,
    "ln_in_attn": True,
    "conv_last_layer": True,
    "with_cls_token": True,
    "double_z": True,
}
NEEDED = ("video_size", "video_length", "patch_size", "patch_length", "z_chans", "embed_dim", "depth", "num_heads")


class AutoencoderViTMagi1(ModelMixin, ConfigMixin):
    """Transformer VAE: one latent for 4 frames of 8x8 pixels in the published size.

    Opens the published folder as it is (its `config.json` names the class ViTVAE). Encoding returns the posterior mean.

    Args:
        ddconfig: sizes, under the published names.
        model_type: must be "vit".

    Raises:
        UserError: a variant other than the published one, or a missing size.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(self, ddconfig: dict[str, Any], model_type: str = "vit") -> None:
        super().__init__()
        missing = [name for name in NEEDED if name not in ddconfig]
        if missing:
            raise UserError(f"the autoencoder's ddconfig lacks {', '.join(missing)}")
        wrong = [f"{name}={ddconfig[name]}" for name, value in FIXED.items() if ddconfig.get(name, value) != value]
        if wrong or model_type != "vit":
            raise UserError(f"autoencoder variant {', '.join(wrong) or model_type} is not supported")
        side, length = ddconfig["video_size"], ddconfig["video_length"]
        size, frames = ddconfig["patch_size"], ddconfig["patch_length"]
        common = {
            "patch": (frames, size, size),
            "channels": ddconfig.get("in_chans", 3),
            "latent_channels": ddconfig["z_chans"],
            "width": ddconfig["embed_dim"],
            "grid": (length // frames, side // size, side // size),
            "depth": ddconfig["depth"],
            "heads": ddconfig["num_heads"],
            "mlp_ratio": ddconfig.get("mlp_ratio", 4.0),
            "qkv_bias": ddconfig.get("qkv_bias", False),
        }
        self.encoder = Encoder(**common)
        self.decoder = Decoder(**common)
        self.patch = common["patch"]

    def moments(self, frames: Tensor) -> Tensor:
        """Mean and log variance, untiled: `[batch, 3, frames, height, width]` in [-1, 1] -> twice the channels.

        Raises:
            UserError: sides that do not divide into patches.
        """
        if any(extent % step for extent, step in zip(frames.shape[2:], self.patch, strict=True)):
            raise UserError(
                f"{frames.shape[2]} frames of {frames.shape[3]}x{frames.shape[4]} do not divide into patches of "
                f"{self.patch[0]} frames and {self.patch[1]} pixels"
            )
        return self.encoder(frames)

    def encode(self, frames: Tensor) -> Tensor:
        """Posterior mean, untiled.

        Args:
            frames: `[batch, 3, frames, height, width]` in [-1, 1]; a single frame is an image.

        Returns:
            `[batch, latent channels, latent frames, rows, columns]`, one latent frame for an image.
        """
        if frames.shape[2] == 1:
            return self.encode(frames.expand(-1, -1, self.patch[0], -1, -1))[:, :, :1]
        return self.moments(frames).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Frames, untiled.

        Args:
            latents: `[batch, latent channels, latent frames, rows, columns]`, unscaled.

        Returns:
            `[batch, 3, frames, height, width]`, about [-1, 1]; of a single latent frame all its frames, of which the
            original code keeps the first (a video of 13 latent frames in tiles of 3 loses 3 frames there).
        """
        return self.decoder(latents)

    @apply_forward_hook
    def tiled_encode(self, frames: Tensor, tiling: Tiling) -> Tensor:
        """`encode` in tiles; a single frame is an image in every tile."""
        source, target = tiling.axes((1, 1, 1)), tiling.axes(self.patch)
        return run_tiled(frames, self.encode, source, target, chained=True)

    @apply_forward_hook
    def tiled_decode(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """`decode` in tiles; arguments as there."""
        source = tiling.axes(self.patch)
        # Not the tiling's own pixels: a tile of 14 frames is 3 latents, of which 12 frames come out.
        target = [Axis(axis.size * step, axis.overlap) for axis, step in zip(source, self.patch, strict=True)]
        return run_tiled(latents, self.decode, source, target, chained=False)
