"""Every forward of a video, known before it starts: which chunk, at which time, in which pass, seeing which chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch

from common.errors import UserError
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.schedule import stages, step_intervals, step_size_input, timesteps

PREFIX_KVRANGE = 8  # chunks a prefix chunk attends to when no range is configured


class Role(str, Enum):
    """Why a chunk is run."""

    DENOISE = "denoise"
    CLEAN = "clean"  # a finished chunk, once, for the keys that stay
    NEAR = "near"  # a copy of the oldest chunk that sees no history
    PREFIX = "prefix"  # a given chunk, once, for its keys


class Pass(str, Enum):
    """Guidance pass a forward belongs to."""

    TEXT = "text"
    NULL = "null"  # history but no text
    UNCOND = "uncond"  # neither


@dataclass(frozen=True)
class ChunkCall:
    """One forward of one chunk.

    Attributes:
        iteration: model step of the whole video, from 0; -1 before the first (prefix).
        stage, denoise_index: position of the iteration: stage, and step inside the stage.
        chunk: whose latents are run.
        position: chunk index for the rotary positions.
        step: updates the chunk has had; `num_steps` for clean and prefix chunks.
        t: time, an fp32 value.
        dt: time to the next step, 0 for clean and prefix chunks.
        shortcut: step size input of a distilled model, None for others.
        role, branch: why, and in which guidance pass.
        kv_start, kv_end: range of chunks attended to; the chunk itself is the last of it.
        own_from: first chunk of this iteration's pass; keys of chunks before it come from the kept history.
    """

    iteration: int
    stage: int
    denoise_index: int
    chunk: int
    position: int
    step: int
    t: float
    dt: float
    shortcut: float | None
    role: Role
    branch: Pass
    kv_start: int
    kv_end: int
    own_from: int

    @property
    def kv_chunks(self) -> int:
        """Chunks attended to, itself included."""
        return self.kv_end - self.kv_start

    @property
    def uses_text(self) -> bool:
        """Whether the chunk's own caption is read, not the null caption."""
        return self.branch is Pass.TEXT and self.role in (Role.DENOISE, Role.NEAR)


@dataclass(frozen=True)
class SamplingPlan:
    """The forwards of one video.

    Args:
        config: how to sample.
        num_chunks: chunks of the video, prefix included.
        prefix_frames: latent frames given.

    Raises:
        UserError: nothing to generate.
    """

    config: SamplingConfig
    num_chunks: int
    prefix_frames: int = 0

    def __post_init__(self) -> None:
        if self.num_chunks <= self.offset:
            raise UserError(
                f"{self.num_chunks} chunks, of which {self.offset} are given: nothing to generate; raise num_frames"
            )

    @classmethod
    def for_frames(cls, config: SamplingConfig, num_frames: int, prefix_frames: int = 0) -> SamplingPlan:
        """A plan for `num_frames` new frames after `prefix_frames` latent frames; the last chunk is filled up."""
        if num_frames < config.temporal_downsample_factor:
            raise UserError(
                f"num_frames {num_frames} is less than one latent frame, {config.temporal_downsample_factor} frames"
            )
        latents = num_frames // config.temporal_downsample_factor + prefix_frames
        return cls(config, math.ceil(latents / config.chunk_width), prefix_frames)

    @property
    def offset(self) -> int:
        """Whole chunks given as prefix."""
        return self.prefix_frames // self.config.chunk_width

    @property
    def latent_frames(self) -> int:
        """Latent frames of the video, prefix included."""
        return self.num_chunks * self.config.chunk_width

    @property
    def keeping_pass(self) -> Pass:
        """The pass whose keys and values stay for later chunks."""
        return Pass.TEXT if self.config.cfg_number == 1 else Pass.NULL

    @property
    def clean_time(self) -> float:
        """`clean_t` as the fp32 value that the model gets."""
        return torch.tensor(self.config.clean_t, dtype=torch.float32).item()

    @property
    def total_iterations(self) -> int:
        """Model steps of the whole video."""
        return self.config.steps_per_stage * (self.num_chunks + self.config.window_size - 1 - self.offset)

    def most_chunks(self, branch: str) -> int:
        """Most chunks whose keys are held at a time: by a guidance pass, or by the nearly-clean copy (`"near"`)."""
        if branch == Role.NEAR.value:
            return 1
        if branch != self.keeping_pass.value:  # of its own iteration, in which one more may be at its clean pass
            at_once = self.config.window_size + (branch == Pass.TEXT.value)
            return min(at_once, self.num_chunks - self.offset)
        most, earliest = self.offset, self.num_chunks
        for calls in reversed(list(self.iterations())):
            calls = [call for call in calls if call.branch is self.keeping_pass and call.role is not Role.NEAR]
            earliest = min(earliest, *(call.kv_start for call in calls))
            most = max(most, calls[-1].kv_end - earliest)
        return most

    def prefix_calls(self) -> tuple[ChunkCall, ...]:
        """Forwards of the given whole chunks, before the first iteration."""
        config = self.config
        width = config.clean_chunk_kvrange
        if width == -1:
            width = config.noise2clean_kvrange[-1] if config.noise2clean_kvrange else PREFIX_KVRANGE
        return tuple(
            ChunkCall(
                iteration=-1,
                stage=0,
                denoise_index=0,
                chunk=chunk,
                position=chunk,
                step=config.num_steps,
                t=self.clean_time,
                dt=0.0,
                shortcut=self._shortcut(0),
                role=Role.PREFIX,
                branch=self.keeping_pass,
                kv_start=max(0, chunk + 1 - width),
                kv_end=chunk + 1,
                own_from=0,
            )
            for chunk in range(self.offset)
        )

    def iterations(self) -> Iterator[tuple[ChunkCall, ...]]:
        """The forwards of every iteration: pass after pass, in each the chunks in causal order.

        Yields:
            Calls of one iteration. All that guidance names are listed, also those whose weight is zero
            (`guidance.without_unused` drops those).
        """
        for iteration in range(self.total_iterations):
            calls = self._text_or_null_calls(iteration)
            if self.config.cfg_number == 1:
                yield (*calls, *self._nearly_clean_copy(calls))
            else:
                null = [replace(call, branch=Pass.NULL) for call in calls]
                alone = [
                    replace(call, branch=Pass.UNCOND, position=0, kv_start=0, kv_end=1, own_from=0)
                    for call in calls
                    if call.role is Role.DENOISE
                ]
                yield (*calls, *null, *alone)

    def _text_or_null_calls(self, iteration: int) -> list[ChunkCall]:
        config = self.config
        times = timesteps(config.num_steps, config.shortcut_mode)
        steps = times.tolist()
        lengths = (times[1:] - times[:-1]).tolist()
        number, index = divmod(iteration, config.steps_per_stage)
        stage = stages(self.num_chunks, config.window_size, self.offset)[number]
        has_clean = stage.chunk_start > self.offset and index == 0
        first = stage.chunk_start - has_clean
        calls = []
        for chunk in range(first, stage.chunk_end):
            clean = chunk < stage.chunk_start
            step = config.num_steps if clean else stage.level(chunk) * config.steps_per_stage + index
            calls.append(
                ChunkCall(
                    iteration=iteration,
                    stage=number,
                    denoise_index=index,
                    chunk=chunk,
                    position=chunk,
                    step=step,
                    t=self.clean_time if clean else steps[step],
                    dt=0.0 if clean else lengths[step],
                    shortcut=self._shortcut(index),
                    role=Role.CLEAN if clean else Role.DENOISE,
                    branch=Pass.TEXT,
                    kv_start=max(0, chunk + 1 - self._kv_width(step, chunk)),
                    kv_end=chunk + 1,
                    own_from=first,
                )
            )
        return calls

    def _nearly_clean_copy(self, calls: list[ChunkCall]) -> list[ChunkCall]:
        oldest = next(call for call in calls if call.role is Role.DENOISE)
        if not oldest.t > self.config.nearly_clean_threshold:
            return []
        end = calls[-1].chunk + 1
        return [replace(oldest, role=Role.NEAR, position=end, kv_start=end, kv_end=end + 1, own_from=end)]

    def _kv_width(self, step: int, chunk: int) -> int:
        config = self.config
        widths = config.noise2clean_kvrange
        if not widths:
            return chunk + 1
        if step == config.num_steps:
            return widths[-1] if config.clean_chunk_kvrange == -1 else config.clean_chunk_kvrange
        return widths[step // (config.num_steps // len(widths))]

    def _shortcut(self, denoise_index: int) -> float | None:
        config = self.config
        if not config.distill:
            return None
        return step_size_input(config.num_steps, step_intervals(config.num_steps, config.shortcut_mode)[denoise_index])
