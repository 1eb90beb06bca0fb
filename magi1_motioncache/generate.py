"""Makes one video through the pipeline, as often as asked, and times the denoising alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import generator
from common.cache import MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.devices import synchronize
from common.generator import Denoised, OnFrames, OnIteration
from magi1_motioncache.attach import MotionCacheHandle, apply_motioncache, remove_motioncache
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.denoiser import Denoiser
from magi1_motioncache.flops import trace_flops
from magi1_motioncache.pipeline import DenoiserFactory, Magi1Pipeline, VideoChunk
from magi1_motioncache.plan import SamplingPlan
from magi1_motioncache.settings import RunSettings
from magi1_motioncache.special_tokens import SpecialTokenOptions
from magi1_motioncache.transformer import Magi1Transformer3DModel


class Generator(generator.Generator):
    """One video of the pipeline (see the base class).

    No library ships MAGI-1, so there is no stock pipeline to compare with: exact is the only reference.

    Args:
        pipe: on its device.
        settings, image, video: as in the base class.
        sampling: how to sample.
        tokens: special tokens; None for those that the pipeline takes by itself.
    """

    settings: RunSettings

    def __init__(
        self,
        pipe: Magi1Pipeline,
        settings: RunSettings,
        sampling: SamplingConfig,
        tokens: SpecialTokenOptions | None = None,
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
    ) -> None:
        super().__init__(settings, image, video)
        self.pipe, self.sampling, self.tokens = pipe, sampling, tokens
        self.plan = plan_video(settings, sampling)
        self.has_prefix = self.plan.prefix_frames > 0

    def encode(self) -> None:
        """Encode the prompt. Needed once before `run`."""
        self.features, self.mask = self.pipe.encode_prompt(self.settings.prompt)

    @property
    def total_iterations(self) -> int:
        """Iterations of the whole video."""
        return self.plan.total_iterations

    def attach(self, config: MotionCacheConfig, keep_maps: bool, policy: Policy | None = None) -> MotionCacheHandle:
        """Put the cache into the pipeline, until `detach` (see the base class)."""
        return apply_motioncache(self.pipe, config, keep_maps, policy)

    def detach(self) -> None:
        """Take the cache out again."""
        remove_motioncache(self.pipe)

    def run(
        self,
        on_iteration: OnIteration | None = None,
        stop_after: int | None = None,
        on_frames: OnFrames | None = None,
    ) -> Denoised:
        """Denoise the video once (see the base class). Chunks are decoded as they are finished, while the clock stands.

        After `stop_after` iterations there are latents of the chunks that were finished, if any.
        """
        clock = _Clock(self.pipe._execution_device)
        ends: list[float] = []
        latents: list[Tensor] = []
        frames: list[np.ndarray] = []

        def denoiser(transformer: Magi1Transformer3DModel, captions: ChunkCaptions, plan: SamplingPlan) -> Denoiser:
            self._text_tokens = int(captions.text_mask[-1].sum())
            answers = self.pipe.denoiser(transformer, captions, plan)
            clock.start()
            return answers

        def after_iteration() -> None:
            ends.append(clock.read())
            if on_iteration is not None:
                on_iteration()
            if len(ends) == stop_after:
                raise _Enough

        try:
            for chunk in self._stream(denoiser, after_iteration):
                clock.stop()
                latents.append(chunk.latents)
                if on_frames is not None:
                    frames.append(self._decode_chunk(chunk.latents))
                    on_frames(frames[-1] if len(frames) > 1 else self.with_given(frames[-1]))
                clock.start()
        except _Enough:
            pass
        return Denoised(
            torch.cat(latents, dim=2) if latents else torch.empty(0),
            ends,
            np.concatenate(frames) if frames else None,
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """Frames of all generated chunks, `[frames, height, width, 3]` floats in [0, 1], chunk by chunk."""
        width = self.sampling.chunk_width
        first = width - self._first_latent % width
        sizes = [first] + [width] * ((latents.shape[2] - first) // width)
        return np.concatenate([self._decode_chunk(part) for part in latents.split(sizes, dim=2)])

    def with_given(self, frames: np.ndarray) -> np.ndarray:
        """Decoded frames after those of the given video that they continue; as they are without one."""
        if self.given_video is None:
            return frames
        return np.concatenate([self.given_video.astype(frames.dtype) / 255, frames])

    def chunk_frames(self, frames: np.ndarray, window: int, chunk: int) -> np.ndarray:
        """One decoded frame for each latent frame of a chunk (see the base class)."""
        factor, width = self.sampling.temporal_downsample_factor, self.sampling.chunk_width
        whole = self.with_given(frames)
        before = 0 if self.given_video is None else len(self.given_video) - self.settings.overlap_history
        latents = range(chunk * width, (chunk + 1) * width)
        return whole[[before + latent * factor + factor // 2 for latent in latents]]

    def trace_flops(self, trace: Trace) -> float:
        """Matrix products of what a trace records."""
        return trace_flops(self.pipe.transformer.config, trace, self._text_tokens, self.sampling.distill)

    @property
    def _first_latent(self) -> int:
        """First latent frame that is handed out: an image's is, a video's are not."""
        return 0 if self.given_video is None else self.plan.prefix_frames

    def _stream(self, denoiser: DenoiserFactory, on_iteration: OnIteration) -> Iterator[VideoChunk]:
        s = self.settings
        given: dict[str, Any] = {}
        if self.given_video is not None:
            given["video"] = [Image.fromarray(frame) for frame in self.given_video[-s.overlap_history :]]
        elif self.given_image is not None:
            given["image"] = Image.fromarray(self.given_image)
        return self.pipe.stream(
            **given,
            height=s.height,
            width=s.width,
            num_frames=new_frames(s, self.sampling),
            sampling=self.sampling,
            special_tokens=self.tokens,
            generator=torch.Generator("cpu").manual_seed(s.seed),
            prompt_features=self.features,
            prompt_mask=self.mask,
            denoiser=denoiser,
            decode=False,
            on_iteration=on_iteration,
        )

    def _decode_chunk(self, latents: Tensor) -> np.ndarray:
        pixels = self.pipe.decode_latents(latents, self.sampling).float()
        return self.pipe.video_processor.postprocess_video(pixels, output_type="np")[0]


def new_frames(settings: RunSettings, sampling: SamplingConfig) -> int:
    """Frames that the pipeline is asked for: it does not count given ones, and an image is a whole latent frame."""
    factor = sampling.temporal_downsample_factor
    return settings.num_frames - {"text": 0, "image": factor, "video": settings.overlap_history}[settings.kind]


def plan_video(settings: RunSettings, sampling: SamplingConfig) -> SamplingPlan:
    """The forwards of the video."""
    factor = sampling.temporal_downsample_factor
    given = {"text": 0, "image": 1, "video": settings.overlap_history // factor}[settings.kind]
    return SamplingPlan.for_frames(sampling, new_frames(settings, sampling), given)


class _Enough(Exception):
    """As many iterations as were asked for."""


class _Clock:
    """Seconds of a device's work, without those between `stop` and `start`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._since = 0.0

    def start(self) -> None:
        synchronize(self.device)
        self._since = time.perf_counter()

    def read(self) -> float:
        synchronize(self.device)
        return self._seconds + time.perf_counter() - self._since

    def stop(self) -> None:
        self._seconds = self.read()
