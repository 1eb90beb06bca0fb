"""What each chunk is at each iteration of a window, read from the stock pipeline's own timestep matrix."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from common.errors import UserError

Status = Literal["waiting", "active", "finished"]


@dataclass(frozen=True)
class WindowPlan:
    """The schedule of one window.

    Attributes:
        timesteps: `[iterations, frames]`, what the pipeline tells the transformer, before a prefix is noised.
        step_index: `[iterations, frames]`, 0 not started, 1 to `num_steps` denoising, `num_steps + 1` clean.
        update_mask: `[iterations, frames]` bool, frames whose latents change after the iteration.
        num_steps: denoising steps per frame.
        prefix_frames: leading latent frames that were given, by the window before, an image or a video.
        block: latent frames per chunk; all of the window when attention is not causal.
    """

    timesteps: Tensor
    step_index: Tensor
    update_mask: Tensor
    num_steps: int
    prefix_frames: int
    block: int

    @classmethod
    def from_matrices(
        cls,
        timesteps: Tensor,
        step_index: Tensor,
        update_mask: Tensor,
        intervals: list[tuple[int, int]],
        num_steps: int,
        frames: int,
        prefix_frames: int,
        causal_block: int,
    ) -> WindowPlan:
        """Take over what `generate_timestep_matrix` of the stock pipeline returned.

        Args:
            frames: latent frames of the window; the stock matrices drop those that do not fill a chunk.
            causal_block: the transformer's `num_frame_per_block`; 1 means that its attention has no causal mask, and
                the window is one chunk.

        Raises:
            UserError: the window's frames do not fill its chunks, or the pipeline would slide inside the window.
        """
        block = causal_block if causal_block > 1 else frames
        if frames % block:
            raise UserError(
                f"a window of {frames} latent frames does not fill chunks of {block}; "
                f"use {frames // block * block} or {-(-frames // block) * block} latent frames "
                f"(4·(latent frames - 1) + 1 video frames) per window"
            )
        if any(interval != (0, frames) for interval in intervals):
            raise UserError(
                f"the schedule slides inside a window of {frames} latent frames; use a longer base_num_frames"
            )
        return cls(timesteps, step_index, update_mask, num_steps, prefix_frames, block)

    @property
    def frames(self) -> int:
        return self.timesteps.shape[1]

    @property
    def chunks(self) -> int:
        return self.frames // self.block

    @property
    def iterations(self) -> int:
        return self.timesteps.shape[0]

    def frame_range(self, chunk: int) -> slice:
        """Latent frames of a chunk."""
        return slice(chunk * self.block, (chunk + 1) * self.block)

    @cached_property
    def _rows(self) -> tuple[list, list, list]:
        """The three matrices as lists: read from the device once, after the pipeline has made its last changes."""
        return self.timesteps.tolist(), self.step_index.tolist(), self.update_mask.tolist()

    def status(self, iteration: int, chunk: int) -> Status:
        """Whether a chunk's latents change after this iteration, and if not, whether they are final."""
        _, step_index, update_mask = self._rows
        frames = self.frame_range(chunk)
        if any(update_mask[iteration][frames]):
            return "active"
        return "waiting" if max(step_index[iteration][frames]) == 0 else "finished"

    def step(self, iteration: int, chunk: int) -> tuple[int, int]:
        """Denoising step of an active chunk, from 0, and how many it gets.

        Without a causal mask frames of the one chunk may be at different steps: then iterations are counted.
        """
        if self.chunks == 1:
            return iteration, self.iterations
        return max(self._rows[1][iteration][self.frame_range(chunk)]) - 1, self.num_steps

    def sigma(self, iteration: int, chunk: int) -> float:
        """Noise level of an active chunk, 0 to 1: the mean over the frames that are being denoised."""
        timesteps, _, update_mask = (row[iteration][self.frame_range(chunk)] for row in self._rows)
        moving = [t for t, updated in zip(timesteps, update_mask, strict=True) if updated]
        return sum(moving) / len(moving) / 1000

    def shared_timestep(self, iteration: int, chunk: int) -> float | None:
        """The timestep that the transformer is told for all frames of a chunk; None if they differ or any was given."""
        timesteps = set(self._rows[0][iteration][self.frame_range(chunk)])
        return timesteps.pop() if len(timesteps) == 1 and not self.is_prefix(chunk) else None

    def work(self, iteration: int, clean: Container[int]) -> list[int]:
        """Chunks that must be computed at an iteration, in causal order.

        Those are the active ones, and finished ones whose K/V are not clean yet but will be read by a later chunk that
        still has steps to do.

        Args:
            iteration: of the window.
            clean: chunks whose K/V are final.
        """
        update_mask = self._rows[2]
        chosen = []
        for chunk in range(self.chunks):
            status = self.status(iteration, chunk)
            later = slice(self.frame_range(chunk).stop, None)
            if status == "active" or (
                status == "finished" and chunk not in clean and any(any(row[later]) for row in update_mask[iteration:])
            ):
                chosen.append(chunk)
        return chosen

    def is_prefix(self, chunk: int) -> bool:
        """Whether any frame of the chunk was given."""
        return self.frame_range(chunk).start < self.prefix_frames

    def is_mixed(self, chunk: int) -> bool:
        """Whether frames of the chunk may be at different noise levels."""
        return self.chunks == 1 or (self.is_prefix(chunk) and self.prefix_frames < self.frame_range(chunk).stop)

    def check(self, iteration: int, timestep: Tensor) -> None:
        """Compare with what the transformer is called with: shapes always, values once per window.

        Args:
            timestep: `[batch, frames]`.

        Raises:
            RuntimeError: they differ outside the prefix: another loop than the planned one is driving the model.
        """
        if iteration >= self.iterations:
            raise RuntimeError(f"transformer called {iteration + 1} times in a window of {self.iterations} iterations")
        given = timestep.shape[1] == self.frames
        if given and iteration == 0:
            expected = self.timesteps[0].to(timestep.device)
            given = torch.equal(timestep[0, self.prefix_frames :].float(), expected[self.prefix_frames :].float())
        if not given:
            raise RuntimeError(
                f"iteration {iteration}: the transformer was called with timesteps {timestep[0].tolist()}, "
                f"the pipeline planned {self._rows[0][iteration]}"
            )
