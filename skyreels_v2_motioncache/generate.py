"""Makes one video through the stock pipeline, as often as asked, and times the denoising alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.video import resize_and_crop
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import Window

OnIteration = Callable[[], None]


@dataclass(frozen=True)
class Denoised:
    """Latents `[1, channels, frames, height, width]` float32, and how long their denoising took.

    Attributes:
        iteration_seconds: end of each iteration, counted from the first call of the transformer.
    """

    latents: Tensor
    iteration_seconds: list[float]

    @property
    def seconds(self) -> float:
        return self.iteration_seconds[-1]


class Generator:
    """One video's inputs, prepared once, so that runs of the pipeline differ in nothing but how they compute.

    Args:
        pipe: stock pipeline for the settings' kind of input, on its device.
        settings: checked against the model.
        windows: as planned for it.
        image: `[height, width, 3]` uint8, for image-to-video.
        video: `[frames, height, width, 3]` uint8, for video-to-video.
    """

    def __init__(
        self,
        pipe: Any,
        settings: RunSettings,
        windows: list[Window],
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
    ) -> None:
        self.pipe, self.settings, self.windows = pipe, settings, windows
        self.given_video = None if video is None else self._fitted(video)
        self.given_image = None if image is None else self._fitted(image[None])[0]
        self.iterations = [self._count_iterations(window) for window in windows]
        self._first_frame: Tensor | None = None

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

    def unknown_words(self) -> list[str]:
        """Words of the prompt that the model's tokenizer has no token for, in order."""
        tokenizer = self.pipe.tokenizer
        words = re.findall(r"\w+", self.settings.prompt)
        return [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False).input_ids]

    def run(self, on_iteration: OnIteration | None = None, stop_after: int | None = None) -> Denoised:
        """Denoise the video once.

        Args:
            on_iteration: called after each iteration.
            stop_after: end after so many iterations; the latents are then noise still.
        """
        s, pipe = self.settings, self.pipe
        torch.manual_seed(s.seed)  # the pipelines draw the noise on given frames without a generator
        began: list[float] = []
        ends: list[float] = []

        def start_clock(*_: Any) -> None:
            if not began:
                _synchronize(pipe._execution_device)
                began.append(time.perf_counter())

        def after_iteration(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if self._first_frame is not None and len(ends) < self.iterations[0]:
                # The stock pipeline updates an image's frame with the rest of its chunk: put it back.
                tensors["latents"][:, :, :1] = self._first_frame
            _synchronize(pipe._execution_device)
            ends.append(time.perf_counter() - began[0])
            pipe._interrupt = stop_after is not None and len(ends) >= stop_after
            if on_iteration is not None:
                on_iteration()
            return tensors

        hook = pipe.transformer.register_forward_pre_hook(start_clock)
        try:
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

    def stock_seconds(self, measured: Denoised) -> float:
        """Denoising time of the whole stock pipeline, from its first iterations without the very first.

        Every iteration of a window costs the stock pipeline the same, and windows cost as their tokens and the squares
        of them: it computes all pairs of tokens and masks some.
        """
        ends = measured.iteration_seconds
        each = (ends[-1] - ends[0]) / (len(ends) - 1)
        cost = model_cost(self.pipe.transformer, self.settings.max_sequence_length)
        first, *_ = sizes = [cost.blocks(self._tokens(w), self._tokens(w)) for w in self.windows]
        return sum(each * n * size / first for n, size in zip(self.iterations, sizes, strict=True))

    def stock_flops(self) -> float:
        """Matrix products of the stock pipeline, attention counted on the block-causal area."""
        cost = model_cost(self.pipe.transformer, self.settings.max_sequence_length)
        flops = 0.0
        for window, iterations in zip(self.windows, self.iterations, strict=True):
            block = self.settings.causal_block_size
            chunks = window.frames // block if block > 1 else 1
            flops += iterations * self._branches * cost.window_forward(chunks, self._tokens(window) // chunks)
        return flops

    def stock_tokens(self) -> int:
        """Tokens that go through the stock block stack: all of a window, at every iteration and branch."""
        pairs = zip(self.windows, self.iterations, strict=True)
        return sum(n * self._branches * self._tokens(window) for window, n in pairs)

    @property
    def _branches(self) -> int:
        return 2 if self.settings.guided else 1

    def _tokens(self, window: Window) -> int:
        _, rows, columns = self.pipe.transformer.config.patch_size
        factor = self.pipe.vae_scale_factor_spatial
        return window.frames * (self.settings.height // factor // rows) * (self.settings.width // factor // columns)

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

    def _fitted(self, frames: np.ndarray) -> np.ndarray:
        return np.stack([resize_and_crop(frame, self.settings.height, self.settings.width) for frame in frames])

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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
