"""Text, image or video -> video with MAGI-1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from common.errors import UserError
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import PREFIX_FRAMES, SamplingConfig
from magi1_motioncache.denoiser import Denoiser, ExactDenoiser
from magi1_motioncache.plan import SamplingPlan
from magi1_motioncache.sampler import Magi1Sampler
from magi1_motioncache.special_tokens import SpecialTokenOptions, SpecialTokens
from magi1_motioncache.text import encode_prompt
from magi1_motioncache.transformer import PATCH, Magi1Transformer3DModel
from magi1_motioncache.vae import AutoencoderViTMagi1
from magi1_motioncache.vae_tiling import Tiling

TILE_PIXELS = 256
DenoiserFactory = Callable[[Magi1Transformer3DModel, ChunkCaptions, SamplingPlan], Denoiser]
PUBLISHED_TOKENS = SpecialTokenOptions(high_quality=True, duration=True)


@dataclass
class Magi1PipelineOutput(BaseOutput):
    """A finished video.

    Attributes:
        frames: by `output_type`: "pil" lists of images, "np" `[1, frames, height, width, 3]` and "pt"
            `[1, frames, 3, height, width]` in [0, 1], "latent" `[1, channels, latent frames, rows, columns]` as the
            transformer sees them.
    """

    frames: Any


@dataclass(frozen=True)
class VideoChunk:
    """A finished part of a video.

    Attributes:
        index: number of the chunk, not counting whole given chunks.
        latents: `[1, channels, latent frames, rows, columns]`, scaled as the transformer sees them.
        frames: `[1, 3, frames, height, width]`, about [-1, 1], None if not decoded.
    """

    index: int
    latents: Tensor
    frames: Tensor | None


class Magi1Pipeline(DiffusionPipeline):
    """MAGI-1, exact or with a caching denoiser.

    Args:
        tokenizer, text_encoder: T5 v1.1; may be None when prompt features are given.
        transformer: the model.
        vae: its autoencoder.
        special_tokens: learned caption tokens; None to do without.
        sampling: sampling options of this checkpoint (`SamplingConfig` as a dict); its defaults where missing.

    Attributes:
        denoiser: makes what answers the forwards of a video; `apply_motioncache` puts a caching one here.

    Raises:
        UserError: parts whose sizes do not fit together.

    Example:
        >>> dtype = {"default": torch.float32, "transformer": torch.bfloat16}
        >>> pipe = Magi1Pipeline.from_pretrained("path/to/magi1", dtype=dtype).to("cuda")
        >>> video = pipe("a serene lake at dawn", height=720, width=720, num_frames=96).frames[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    # The autoencoder is small and runs between the chunks: it would push the transformer off the device each time.
    _exclude_from_cpu_offload = ["vae", "special_tokens"]  # noqa: RUF012
    _optional_components = ["tokenizer", "text_encoder", "special_tokens"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: T5EncoderModel | None,
        transformer: Magi1Transformer3DModel,
        vae: AutoencoderViTMagi1,
        special_tokens: SpecialTokens | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_widths(transformer, text_encoder, special_tokens)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            special_tokens=special_tokens,
        )
        self.sampling = SamplingConfig.from_dict(sampling or {})
        self.register_to_config(sampling=self.sampling.to_dict())
        self.denoiser: DenoiserFactory = ExactDenoiser
        self.video_processor = VideoProcessor(vae_scale_factor=vae.patch[-1])

    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Features `[tokens, channels]` and mask `[tokens]` of a prompt.

        Raises:
            UserError: the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this pipeline has no text encoder; pass prompt_features and prompt_mask")
        length = self.transformer.config.caption_max_length
        return encode_prompt(prompt, self.tokenizer, self.text_encoder, length, self._execution_device)

    @torch.no_grad()
    def encode_video(self, frames: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """Scaled latents of given frames.

        Args:
            frames: `[1, 3, frames, height, width]` in [-1, 1]; one frame is an image.
            sampling: tells scale and tile length; the pipeline's own by default.

        Returns:
            `[1, channels, latent frames, rows, columns]`.
        """
        sampling = sampling or self.sampling
        frames = frames.to(self._execution_device, self.vae.dtype)
        return self.vae.tiled_encode(frames, self.tiling(sampling)).float() * sampling.scale_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """Frames `[1, 3, frames, height, width]`, about [-1, 1], of scaled latents."""
        sampling = sampling or self.sampling
        unscaled = (latents / sampling.scale_factor).to(self.vae.dtype)
        return self.vae.tiled_decode(unscaled, self.tiling(sampling))

    def tiling(self, sampling: SamplingConfig) -> Tiling:
        """Tiles of half a second and 256 pixels; half a second of a slow video is rounded up to a latent frame."""
        length = max(sampling.fps // 2, sampling.temporal_downsample_factor)
        return Tiling(length=length, height=TILE_PIXELS, width=TILE_PIXELS)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | None = None,
        *,
        image: Image.Image | Tensor | None = None,
        video: list[Image.Image] | np.ndarray | Tensor | None = None,
        height: int = 720,
        width: int = 720,
        num_frames: int = 96,
        sampling: SamplingConfig | None = None,
        special_tokens: SpecialTokenOptions | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_features: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        denoiser: DenoiserFactory | None = None,
        decode: bool = True,
        on_iteration: Callable[[], None] | None = None,
    ) -> Iterator[VideoChunk]:
        """Generate a video chunk by chunk.

        Args:
            prompt: what to show.
            image: first frame.
            video: beginning; its first 32 frames are used.
            height, width: frame size in pixels, multiples of 16.
            num_frames: frames to generate, after the given ones; the last chunk is filled up.
            sampling: options for this video instead of the pipeline's.
            special_tokens: which learned tokens to put in front of the caption; quality and duration by default, if the
                pipeline has any.
            generator: source of the noise.
            latents: `[1, channels, latent frames, height / 8, width / 8]` initial noise instead.
            prompt_features, prompt_mask: `[tokens, channels]` and `[tokens]` instead of a prompt.
            denoiser: makes what answers the forwards from transformer, captions and plan; the pipeline's own by
                default.
            decode: whether to run the autoencoder.
            on_iteration: called after each iteration.

        Yields:
            Each chunk as soon as it is finished, in order.

        Raises:
            UserError: sizes or inputs that do not fit.
        """
        sampling = sampling or self.sampling
        patch = self.vae.patch[-1]
        if height < 1 or width < 1 or height % (PATCH * patch) or width % (PATCH * patch):
            raise UserError(f"frame size {height}x{width}: both sides must be positive multiples of {PATCH * patch}")
        if image is not None and video is not None:
            raise UserError("image and video both given; a video begins with one of them")
        features, mask = self._features(prompt, prompt_features, prompt_mask)
        prefix = self._prefix(image, video, height, width, sampling)
        plan = SamplingPlan.for_frames(sampling, num_frames, 0 if prefix is None else prefix.shape[2])
        device = self._execution_device
        shape = (1, self.transformer.latent_channels, plan.latent_frames, height // patch, width // patch)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)} for a video of {shape}")
        if special_tokens is None and self.special_tokens is not None:
            special_tokens = PUBLISHED_TOKENS
        captions = ChunkCaptions.build(
            features.to(device),
            mask.to(device),
            self.transformer.y_embedder.null_caption_embedding.to(device),
            plan.num_chunks,
            plan.offset,
            self.special_tokens,
            special_tokens,
        )
        sampler = Magi1Sampler(plan, latents.to(device), prefix)
        answers = (denoiser or self.denoiser)(self.transformer, captions, plan)
        with self.progress_bar(total=plan.num_chunks - plan.offset) as progress:
            for chunk in sampler.run(answers, on_iteration):
                frames = self.decode_latents(chunk.latents, sampling) if decode else None
                progress.update()
                yield VideoChunk(chunk.index, chunk.latents, frames)
        self.maybe_free_model_hooks()

    @torch.no_grad()
    def __call__(self, prompt: str | None = None, *, output_type: str = "pil", **options: Any) -> Magi1PipelineOutput:
        """Generate a video.

        Args:
            prompt: what to show.
            output_type: "pil", "np", "pt" or "latent" (see `Magi1PipelineOutput`).
            **options: as in `stream`.

        Raises:
            UserError: sizes or inputs that do not fit.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")
        chunks = list(self.stream(prompt, decode=output_type != "latent", **options))
        if output_type == "latent":
            return Magi1PipelineOutput(frames=torch.cat([chunk.latents for chunk in chunks], dim=2))
        frames = torch.cat([chunk.frames for chunk in chunks], dim=2).float()
        return Magi1PipelineOutput(frames=self.video_processor.postprocess_video(frames, output_type=output_type))

    def _features(self, prompt: str | None, features: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if (prompt is None) == (features is None):
            raise UserError("give either a prompt or prompt_features")
        if prompt is not None:
            return self.encode_prompt(prompt)
        if mask is None or mask.shape != features.shape[:1]:
            raise UserError("prompt_features need a prompt_mask with one entry per token")
        width = self.transformer.config.caption_channels
        if features.ndim != 2 or features.shape[1] != width:
            raise UserError(f"prompt_features of shape {tuple(features.shape)} are not [tokens, {width}]")
        return features.float(), mask

    def _prefix(
        self,
        image: Image.Image | Tensor | None,
        video: list[Image.Image] | np.ndarray | Tensor | None,
        height: int,
        width: int,
        sampling: SamplingConfig,
    ) -> Tensor | None:
        if image is not None:
            pixels = self.video_processor.preprocess(image, height=height, width=width).unsqueeze(2)
        elif video is not None:
            pixels = self.video_processor.preprocess_video(video, height=height, width=width)
            pixels = pixels[:, :, :PREFIX_FRAMES]
            if pixels.shape[2] % sampling.temporal_downsample_factor:
                raise UserError(
                    f"a video of {pixels.shape[2]} frames to continue: give a multiple of "
                    f"{sampling.temporal_downsample_factor}"
                )
        else:
            return None
        return self.encode_video(pixels, sampling)


def _check_widths(
    transformer: Magi1Transformer3DModel, text_encoder: T5EncoderModel | None, special_tokens: SpecialTokens | None
) -> None:
    width = transformer.config.caption_channels
    found = {
        "text_encoder": None if text_encoder is None else text_encoder.config.d_model,
        "special_tokens": None if special_tokens is None else special_tokens.config.caption_channels,
    }
    for part, channels in found.items():
        if channels not in (None, width):
            raise UserError(
                f"{part} has {channels} channels and the transformer takes captions of {width}; give those of one model"
            )
