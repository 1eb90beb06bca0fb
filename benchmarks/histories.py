"""Long videos of either model, and the same videos with every chunk made from exact's history.

In a video that is made chunk after chunk an early difference changes what all later chunks go on from, so the distance
to exact grows whatever made it. Given exact's history, a chunk shows what its own caching costs and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.leader import LeadingDenoiser
from benchmarks.subject import EXACT, Magi1Subject, SkyReelsSubject, Subject
from common.cache import ChunkStep, MotionCacheConfig, Signals, Trace
from common.cache.policy import FULL, Choice, ChunkState, MotionCachePolicy, Policy
from common.settings import RunSettings
from magi1_motioncache import generate as magi_generate
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.folders import find_checkpoint as find_magi
from magi1_motioncache.folders import inspect_checkpoint as inspect_magi
from magi1_motioncache.plan import SamplingPlan
from magi1_motioncache.transformer import Magi1Transformer3DModel
from magi1_motioncache.validate import sampling_options
from skyreels_v2_motioncache import generate as skyreels_generate
from skyreels_v2_motioncache.windows import latent_frames, video_frames

OWN, GIVEN, FIRST = "own", "exact", "first window cached"
"""What a chunk is made from: what the method made before, what exact did, or exact from a cached first window on."""


@dataclass(frozen=True)
class Made:
    """Latents of a video, `[1, channels, frames, height, width]`, and how they were computed."""

    latents: Tensor
    trace: Trace


class CachesSome(MotionCachePolicy):
    """Decides as MotionCache does where it is allowed to, and computes everything elsewhere.

    Args:
        config: of the method.
        allowed: whether a chunk's step may be cached.
    """

    def __init__(self, config: MotionCacheConfig, allowed: Callable[[ChunkStep], bool]) -> None:
        super().__init__(config)
        self.allowed = allowed

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        choice = super().decide(step, state, signals)
        return choice if self.allowed(step) else FULL


class LongVideo(ABC):
    """A loaded model that makes videos of many chunks.

    Args:
        subject: with the settings of `options`.

    Attributes:
        block: latent frames of a chunk.
        factor: frames that a latent frame stands for.
        at_once: chunks of one window; in MAGI-1, chunks that are denoised at the same time.
        bounded: what the model itself does to keep its K/V from growing.
    """

    block: int
    factor: int
    at_once: int
    bounded: ClassVar[str]

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @staticmethod
    @abstractmethod
    def options(settings: RunSettings, chunks: int) -> dict[str, Any]:
        """Settings to change for a video of that many chunks."""

    @staticmethod
    @abstractmethod
    def unbounded(settings: RunSettings, chunks: int) -> dict[str, Any]:
        """The same for a video in which every chunk sees all chunks before it."""

    @staticmethod
    @abstractmethod
    def few_steps(settings: RunSettings) -> dict[str, Any]:
        """Settings with the fewest steps at which as many chunks are at work at the same time."""

    @abstractmethod
    def number(self, window: int, chunk: int) -> int:
        """A chunk's place in the whole video, from 0, by window and chunk of the trace."""

    @abstractmethod
    def exact_and_given(self, generator: Any, configs: Mapping[str, MotionCacheConfig]) -> tuple[Made, dict[str, Made]]:
        """Make a video exactly, and by each method with every chunk made from exact's history.

        Args:
            generator: of the subject.
            configs: methods by name, all of them deciding per chunk.
        """

    def make(self, generator: Any, config: MotionCacheConfig, policy: Policy | None = None) -> Made:
        """Make a video in one way, from its own history."""
        handle = generator.attach(config, keep_maps=False, policy=policy)
        try:
            latents = generator.run().latents
            return Made(latents, handle.trace)
        finally:
            generator.detach()

    def make_first(self, generator: Any, config: MotionCacheConfig) -> Made:
        """Cache in the first window alone, and go on exactly from what became of it."""
        policy = CachesSome(config, lambda step: self.number(step.window, step.chunk) < self.at_once)
        return self.make(generator, config, policy)


class SkyReelsLongVideo(LongVideo):
    """SkyReels-V2: windows, each of which begins with the last latent frames of the one before."""

    bounded = "by windows"

    def __init__(self, subject: SkyReelsSubject) -> None:
        super().__init__(subject)
        self.block, self.factor = subject.settings.causal_block_size, subject.pipe.vae_scale_factor_temporal
        self.at_once = latent_frames(subject.settings.base_num_frames, self.factor) // self.block

    @staticmethod
    def options(settings: RunSettings, chunks: int) -> dict[str, Any]:
        return {"num_frames": video_frames(chunks * settings.causal_block_size)}

    @staticmethod
    def unbounded(settings: RunSettings, chunks: int) -> dict[str, Any]:
        frames = video_frames(chunks * settings.causal_block_size)
        return {"num_frames": frames, "base_num_frames": frames, "overlap_history": None}

    @staticmethod
    def few_steps(settings: RunSettings) -> dict[str, Any]:
        apart = max(settings.ar_step, 1)
        return {"steps": math.ceil(settings.steps / apart), "ar_step": settings.ar_step // apart}

    def number(self, window: int, chunk: int) -> int:
        return self.subject.windows[window].start // self.block + chunk

    def exact_and_given(
        self, generator: skyreels_generate.Generator, configs: Mapping[str, MotionCacheConfig]
    ) -> tuple[Made, dict[str, Made]]:
        """Each window begins with exact's frames; inside a window chunks are made from the window's own (see base)."""
        exact = self.make(generator, EXACT)
        return exact, {name: self._given(generator, config, exact.latents) for name, config in configs.items()}

    def _given(self, generator: skyreels_generate.Generator, config: MotionCacheConfig, exact: Tensor) -> Made:
        pipe = generator.pipe
        prepare = pipe.prepare_latents

        def from_exact(*args: Any, video_latents: Tensor | None = None, **kwargs: Any) -> Any:
            history = None if video_latents is None else exact[:, :, : video_latents.shape[2]].to(video_latents)
            return prepare(*args, video_latents=history, **kwargs)

        pipe.prepare_latents = from_exact
        try:
            return self.make(generator, config)
        finally:
            del pipe.prepare_latents


class Magi1LongVideo(LongVideo):
    """MAGI-1: a window that slides over the chunks, each of which sees the ones before it while they are denoised."""

    bounded = "K/V ranges"

    def __init__(self, subject: Magi1Subject) -> None:
        super().__init__(subject)
        sampling = subject.sampling
        self.block, self.factor = sampling.chunk_width, sampling.temporal_downsample_factor
        self.at_once = sampling.window_size

    @staticmethod
    def options(settings: RunSettings, chunks: int) -> dict[str, Any]:
        sampling = _magi_sampling(settings)
        return {"num_frames": chunks * sampling.chunk_width * sampling.temporal_downsample_factor}

    @staticmethod
    def unbounded(settings: RunSettings, chunks: int) -> dict[str, Any]:
        return {**Magi1LongVideo.options(settings, chunks), "sampling.noise2clean_kvrange": []}

    @staticmethod
    def few_steps(settings: RunSettings) -> dict[str, Any]:
        sampling = _magi_sampling(settings)
        return {"steps": math.lcm(sampling.window_size, len(sampling.noise2clean_kvrange) or 1)}

    def number(self, window: int, chunk: int) -> int:
        return chunk

    def exact_and_given(
        self, generator: magi_generate.Generator, configs: Mapping[str, MotionCacheConfig]
    ) -> tuple[Made, dict[str, Made]]:
        """Each chunk sees exact's keys and values of the chunks before it, at every one of its steps (see base)."""
        leaders: list[LeadingDenoiser] = []

        def lead(transformer: Magi1Transformer3DModel, captions: ChunkCaptions, plan: SamplingPlan) -> LeadingDenoiser:
            leaders.append(LeadingDenoiser(transformer, captions, plan, list(configs.values())))
            return leaders[0]

        before, generator.pipe.denoiser = generator.pipe.denoiser, lead
        try:
            latents = generator.run().latents
        finally:
            generator.pipe.denoiser = before
        leader = leaders[0]
        leader.follow()
        given = {name: Made(f.latents, f.trace) for name, f in zip(configs, leader.followers, strict=True)}
        return Made(latents, leader.trace), given


def _magi_sampling(settings: RunSettings) -> SamplingConfig:
    checkpoint = inspect_magi(find_magi(settings.model), settings.special_tokens_file)
    return sampling_options(settings, checkpoint.sampling)


LONG_VIDEOS: dict[str, type[LongVideo]] = {"SkyReels-V2": SkyReelsLongVideo, "MAGI-1": Magi1LongVideo}
"""By model family."""
