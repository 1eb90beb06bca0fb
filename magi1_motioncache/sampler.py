"""Carries a video's chunks from noise to clean, several at a time, oldest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from magi1_motioncache.denoiser import Denoiser
from magi1_motioncache.guidance import combine, without_unused
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk that has had all its updates.

    Attributes:
        index: number of the chunk, not counting whole prefix chunks.
        start, end: latent frames of the video it stands for, end excluded; given frames at its front are left out.
        latents: `[1, channels, end - start, height, width]` fp32, scaled as the transformer sees them.
    """

    index: int
    start: int
    end: int
    latents: Tensor


class Magi1Sampler:
    """Explicit Euler over a plan.

    Args:
        plan: the forwards of the video.
        noise: `[1, channels, latent frames, height, width]` fp32, initial latents of the whole video.
        prefix: `[1, channels, prefix frames, height, width]`, latents given, None for text to video.

    Raises:
        UserError: noise or prefix that do not fit the plan.
    """

    def __init__(self, plan: SamplingPlan, noise: Tensor, prefix: Tensor | None = None) -> None:
        given = 0 if prefix is None else prefix.shape[2]
        if noise.shape[2] != plan.latent_frames:
            raise UserError(f"noise of {noise.shape[2]} latent frames for a plan of {plan.latent_frames}")
        if given != plan.prefix_frames:
            raise UserError(f"prefix of {given} latent frames for a plan with {plan.prefix_frames}")
        if prefix is not None and (prefix.shape[:2] + prefix.shape[3:] != noise.shape[:2] + noise.shape[3:]):
            raise UserError(f"prefix latents {tuple(prefix.shape)} do not match the video's {tuple(noise.shape)}")
        self.plan = plan
        self.latents = noise.float().clone()
        self.prefix = None if prefix is None else prefix.to(self.latents)

    @torch.no_grad()
    def run(self, denoiser: Denoiser, on_iteration: Callable[[], None] | None = None) -> Iterator[FinishedChunk]:
        """Denoise the video.

        Args:
            denoiser: answers the forwards.
            on_iteration: called after each iteration, before the chunks that it finished are handed out.

        Yields:
            Each chunk as soon as it is finished.
        """
        for call in self.plan.prefix_calls():
            denoiser.predict(call, self._chunk_latents(call.chunk))
        iterations = [without_unused(self.plan.config, calls) for calls in self.plan.iterations()]
        reach = _earliest_needed(iterations)
        for calls, needed in zip(iterations, reach, strict=True):
            denoiser.release(needed)
            finished = self._integrate(calls, self.velocities(denoiser, calls))
            if on_iteration is not None:
                on_iteration()
            yield from finished

    def velocities(self, denoiser: Denoiser, calls: Sequence[ChunkCall]) -> dict[int, Tensor]:
        """Guided velocity of every chunk that one iteration updates.

        Args:
            denoiser: answers the forwards.
            calls: forwards of the iteration.

        Returns:
            `[1, channels, chunk width, height, width]` per chunk.
        """
        passes: dict[int, dict[Pass, Tensor]] = {}
        near: dict[int, Tensor] = {}
        latents = [self._chunk_latents(call.chunk) for call in calls]
        denoiser.start_iteration(calls, latents)
        for call, chunk_latents in zip(calls, latents, strict=True):
            velocity = denoiser.predict(call, chunk_latents)
            if call.role is Role.DENOISE:
                passes.setdefault(call.chunk, {})[call.branch] = velocity
            elif call.role is Role.NEAR:
                near[call.chunk] = velocity
        times = {call.chunk: call.t for call in calls if call.role is Role.DENOISE}
        return {
            chunk: combine(self.plan.config, times[chunk], by_pass, near.get(chunk))
            for chunk, by_pass in passes.items()
        }

    def _integrate(self, calls: Sequence[ChunkCall], velocities: dict[int, Tensor]) -> list[FinishedChunk]:
        updates = {call.chunk: call for call in calls if call.role is Role.DENOISE}
        for chunk, call in updates.items():
            start, end = self._frames(chunk)
            self.latents[:, :, start:end] = self._chunk_latents(chunk) + velocities[chunk] * call.dt
        last = self.plan.config.num_steps - 1
        return [self._finished(chunk) for chunk, call in updates.items() if call.step == last]

    def _finished(self, chunk: int) -> FinishedChunk:
        start, end = self._frames(chunk)
        # A single given frame is an image: its chunk is handed out whole, or the video would begin after it.
        if self.plan.prefix_frames > 1:
            start = max(start, self.plan.prefix_frames)
        return FinishedChunk(chunk - self.plan.offset, start, end, self.latents[:, :, start:end].clone())

    def _chunk_latents(self, chunk: int) -> Tensor:
        """Latents of a chunk as the model gets them: given frames in the place of what was integrated there."""
        start, end = self._frames(chunk)
        given = min(max(self.plan.prefix_frames - start, 0), end - start)
        if not given:
            return self.latents[:, :, start:end]
        return torch.cat([self.prefix[:, :, start : start + given], self.latents[:, :, start + given : end]], dim=2)

    def _frames(self, chunk: int) -> tuple[int, int]:
        width = self.plan.config.chunk_width
        return chunk * width, (chunk + 1) * width


def _earliest_needed(iterations: Sequence[Sequence[ChunkCall]]) -> list[int]:
    """For every iteration, the first chunk that it or a later one still attends to or runs."""
    earliest: list[int] = []
    for calls in reversed(iterations):
        here = min(min(call.kv_start, call.chunk) for call in calls if call.branch is not Pass.UNCOND)
        earliest.append(min([here, *earliest[-1:]]))
    return earliest[::-1]
