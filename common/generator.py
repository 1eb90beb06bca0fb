"""What a command asks of a model: to make the same video several times, in several ways."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from common.cache import MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.settings import RunSettings
from common.video import fit_frames

OnIteration = Callable[[], None]
OnFrames = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class Denoised:
    """Latents `[1, channels, frames, height, width]` float32, and how long their denoising took.

    Attributes:
        iteration_seconds: end of each iteration, counted from the first call of the transformer.
        frames: `[frames, height, width, 3]` in [0, 1], where chunks were decoded while the next ones were denoised.
    """

    latents: Tensor
    iteration_seconds: list[float]
    frames: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        return self.iteration_seconds[-1]


class Handle(Protocol):
    """An attached cache."""

    @property
    def trace(self) -> Trace:
        """What was computed in the latest run."""
        ...


class Stock(Protocol):
    """The unmodified pipeline of a library, as a reference."""

    wanted: Literal["full"] | int
    """Whether to run it whole, or how many iterations to measure."""
    flops: float
    """Matrix products of a whole run."""
    tokens: int
    """Tokens that go through the block stack in a whole run."""

    def seconds(self, measured: Denoised) -> float:
        """Denoising time of a whole run, scaled up from its first iterations."""
        ...


class Generator(ABC):
    """One video's inputs, prepared once, so that runs differ in nothing but how they compute.

    Args:
        settings: checked against the model.
        image: `[height, width, 3]` uint8, for image-to-video.
        video: `[frames, height, width, 3]` uint8, for video-to-video.

    Attributes:
        given_image, given_video: the same, scaled to cover the video's frame and cut to it.
    """

    stock: Stock | None = None
    has_prefix: bool = False
    """Whether some of the frames are given."""

    def __init__(self, settings: RunSettings, image: np.ndarray | None = None, video: np.ndarray | None = None) -> None:
        self.settings = settings
        size = settings.height, settings.width
        self.given_video = None if video is None else fit_frames(video, *size)
        self.given_image = None if image is None else fit_frames(image[None], *size)[0]

    @property
    @abstractmethod
    def total_iterations(self) -> int:
        """Iterations of a whole run."""

    @abstractmethod
    def attach(self, config: MotionCacheConfig, keep_maps: bool, policy: Policy | None = None) -> Handle:
        """Put the cache into the pipeline, until `detach`; `policy` decides in place of the config's own."""

    @abstractmethod
    def detach(self) -> None:
        """Take the cache out again."""

    @abstractmethod
    def run(
        self,
        on_iteration: OnIteration | None = None,
        stop_after: int | None = None,
        on_frames: OnFrames | None = None,
    ) -> Denoised:
        """Denoise the video once.

        Args:
            on_iteration: called after each iteration.
            stop_after: end after so many iterations; the latents are then noise still.
            on_frames: called with the video's next frames as soon as their chunk is clean, given frames first. A model
                whose autoencoder needs the whole video at once does not call it and leaves `Denoised.frames` empty.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """The generated video, `[frames, height, width, 3]` floats in [0, 1]."""

    @abstractmethod
    def with_given(self, frames: np.ndarray) -> np.ndarray:
        """Decoded frames after those of the given video that they continue; as they are without one."""

    @abstractmethod
    def chunk_frames(self, frames: np.ndarray, window: int, chunk: int) -> np.ndarray:
        """One decoded frame for each latent frame of a chunk, `[block, height, width, 3]`.

        Args:
            frames: as decoded, without given ones.
            window, chunk: as in the trace.
        """

    @abstractmethod
    def trace_flops(self, trace: Trace) -> float:
        """Matrix products of what a trace records, a multiply-add counting 2."""


def unknown_words_warning(tokenizer: Any, prompt: str) -> list[str]:
    """One line on the words of a prompt that the model's tokenizer has no token for, if there are any."""
    words = dict.fromkeys(re.findall(r"\w+", prompt))
    unknown = [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False).input_ids]
    if not unknown:
        return []
    return [f"This model does not know the words: {', '.join(unknown)}. It ignores what they mean."]
