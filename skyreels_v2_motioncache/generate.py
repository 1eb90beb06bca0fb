"""Makes one video through the stock pipeline, as often as asked, and times the denoising alone."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import generator
from common.attention import without_cudnn
from common.cache import MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.devices import synchronize
from common.generator import Denoised, OnFrames, OnIteration
from skyreels_v2_motioncache.adapter import MotionCacheHandle, apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.stock import StockReference
from skyreels_v2_motioncache.windows import Window


class Generator(generator.Generator):
    """One video of the stock pipeline (see the base class).

    Args:
        pipe: stock pipeline for the settings' kind of input, on its device.
        settings, image, video: as in the base class.
        windows: as planned for the settings.
    """

    settings: RunSettings

    def __init__(
        self,
        pipe: Any,
        settings: RunSettings,
        windows: list[Window],
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
    ) -> None:
        super().__init__(settings, image, video)
        self.pipe, self.windows = pipe, windows
        self.has_prefix = any(window.prefix for window in windows)
        self.iterations = [self._count_iterations(window) for window in windows]
        self.stock = None if settings.stock == "none" else StockReference(pipe, settings, windows, self.iterations)
        self._first_frame: Tensor | None = None
        self._cached = False

    @property
    def total_iterations(self) -> int:
        """Iterations of all windows."""
        return sum(self.iterations)

    def attach(self, config: MotionCacheConfig, keep_maps: bool, policy: Policy | None = None) -> MotionCacheHandle:
        """Put the cache into the pipeline, until `detach` (see the base class)."""
        handle = apply_motioncache(self.pipe, config, self.settings.prefix_noise, keep_maps, policy)
        self._cached = True
        return handle

    def detach(self) -> None:
        """Take the cache out again."""
        remove_motioncache(self.pipe)
        self._cached = False

    @torch.no_grad()
    def encode(self) -> None:
        """Encode prompts, and the image that the video starts with. Needed once before `run`."""
        s = self.settings
        self.prompt_embeds, self.negative_embeds = self.pipe.encode_prompt(
            s.prompt, s.negative_prompt, s.guided, max_sequence_length=s.max_sequence_length
        )
        if self.given_image is not None and s.causal_block_size > 1:
            pixels = self.pipe.video_processor.preprocess(Image.fromarray(self.given_image), s.height, s.width)
            pixels = pixels.to(self.pipe._execution_device, self.pipe.vae.dtype).unsqueeze(2)
            self._first_frame = self._normalised(self.pipe.vae.encode(pixels).latent_dist.mode())

    def run(
        self,
        on_iteration: OnIteration | None = None,
        stop_after: int | None = None,
        on_frames: OnFrames | None = None,
    ) -> Denoised:
        """Denoise the video once (see the base class); its autoencoder decodes whole videos, after the last step."""
        s, pipe = self.settings, self.pipe
        torch.manual_seed(s.seed)  # the pipelines draw the noise on given frames without a generator
        began: list[float] = []
        ends: list[float] = []

        def start_clock(transformer: Any, *_: Any) -> None:
            if not began:
                if hasattr(transformer, "_hf_hook"):
                    transformer._hf_hook.pre_forward(transformer)  # offloaded weights come before the time begins
                synchronize(pipe._execution_device)
                began.append(time.perf_counter())

        def after_iteration(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if self._first_frame is not None and len(ends) < self.iterations[0]:
                # The stock pipeline updates an image's frame with the rest of its chunk: put it back.
                tensors["latents"][:, :, :1] = self._first_frame
            synchronize(pipe._execution_device)
            ends.append(time.perf_counter() - began[0])
            pipe._interrupt = stop_after is not None and len(ends) >= stop_after
            if on_iteration is not None:
                on_iteration()
            return tensors

        hook = pipe.transformer.register_forward_pre_hook(start_clock)
        try:
            with nullcontext() if self._cached else without_cudnn():  # the stock forward masks its attention
                latents = pipe(
                    **self._inputs(),
                    prompt=None,
                    prompt_embeds=self.prompt_embeds,
                    negative_prompt_embeds=self.negative_embeds,
                    height=s.height,
                    width=s.width,
                    num_frames=s.num_frames,
                    num_inference_steps=s.steps,
                    guidance_scale=s.guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(s.seed),
                    output_type="latent",
                    overlap_history=s.overlap_history,
                    addnoise_condition=s.addnoise_condition,
                    base_num_frames=s.base_num_frames,
                    ar_step=s.ar_step,
                    causal_block_size=s.causal_block_size,
                    fps=s.fps,
                    max_sequence_length=s.max_sequence_length,
                    callback_on_step_end=after_iteration,
                ).frames
        finally:
            hook.remove()
        return Denoised(latents, ends)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The generated video, `[frames, height, width, 3]` floats in [0, 1], given frames of a video included once."""
        vae = self.pipe.vae
        mean, std = _statistics(vae, latents)
        pixels = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]
        self.pipe.maybe_free_model_hooks()
        return self.pipe.video_processor.postprocess_video(pixels, output_type="np")[0]

    def with_given(self, frames: np.ndarray) -> np.ndarray:
        """Decoded frames after those of the given video that they continue; as they are without one."""
        if self.given_video is None:
            return frames
        given = self.given_video.astype(frames.dtype) / 255
        return np.concatenate([given, frames[self.settings.overlap_history :]])

    def chunk_frames(self, frames: np.ndarray, window: int, chunk: int) -> np.ndarray:
        """One decoded frame for each latent frame of a chunk (see the base class)."""
        plan = self.windows[window]
        block = self.settings.causal_block_size if self.settings.causal_block_size > 1 else plan.frames
        factor = self.pipe.vae_scale_factor_temporal
        first = plan.start + chunk * block
        return frames[[latent_to_frame(first + i, factor) for i in range(block)]]

    def trace_flops(self, trace: Trace) -> float:
        """Matrix products of what a trace records."""
        return model_cost(self.pipe.transformer, self.settings.max_sequence_length).trace_flops(trace)

    def _count_iterations(self, window: Window) -> int:
        s = self.settings
        self.pipe.scheduler.set_timesteps(s.steps)
        matrix = self.pipe.generate_timestep_matrix(
            window.frames, self.pipe.scheduler.timesteps, window.frames, s.ar_step, window.prefix, s.causal_block_size
        )[0]
        return len(matrix)

    def _inputs(self) -> dict[str, Any]:
        if self.given_video is not None:
            return {"video": [Image.fromarray(frame) for frame in self.given_video]}
        if self.given_image is not None:
            return {"image": Image.fromarray(self.given_image)}
        return {}

    def _normalised(self, latents: Tensor) -> Tensor:
        mean, std = _statistics(self.pipe.vae, latents)
        return (latents.float() - mean) / std


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, `[1, channels, 1, 1, 1]` float32."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(values, device=like.device) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.float().view(shape), std.float().view(shape)


def latent_to_frame(latent: int, temporal_factor: int) -> int:
    """A video frame in the middle of those that a latent frame decodes to."""
    return 0 if latent == 0 else (latent - 1) * temporal_factor + 1 + temporal_factor // 2
