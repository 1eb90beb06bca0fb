"""MAGI-1's exact run with followers: other ways of making its chunks, each from exact's earlier chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.subject import EXACT
from common.cache import MotionCacheConfig
from magi1_motioncache.adapter import CachedDenoiser
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.sampler import Magi1Sampler
from magi1_motioncache.transformer import Magi1Transformer3DModel


class LeadingDenoiser(CachedDenoiser):
    """Denoises exactly, with followers that take each iteration after it, while its keys and values are there.

    Args:
        transformer, captions, plan: as for `CachedDenoiser`.
        configs: of the followers.
    """

    def __init__(
        self,
        transformer: Magi1Transformer3DModel,
        captions: ChunkCaptions,
        plan: SamplingPlan,
        configs: Sequence[MotionCacheConfig],
    ) -> None:
        super().__init__(transformer, captions, plan, EXACT)
        self.followers = [FollowingDenoiser(self, config) for config in configs]
        self._calls: list[ChunkCall] = []

    def start_iteration(self, calls: Sequence[ChunkCall], latents: Sequence[Tensor]) -> None:
        """Hand the noise of chunks that begin to the followers."""
        self._calls = [call for call in calls if call.role in (Role.DENOISE, Role.NEAR)]
        for follower in self.followers:
            follower.begin(calls, latents)

    def release(self, before_chunk: int) -> None:
        """Free what the next iterations need no more (see `Denoiser`), after the followers have had it."""
        self.follow()
        super().release(before_chunk)

    def follow(self) -> None:
        """Have the followers take the iteration that was taken last."""
        for follower in self.followers:
            follower.step(self._calls)
        self._calls = []


class FollowingDenoiser(CachedDenoiser):
    """Makes the chunks of an exact run in another way, from the exact run's keys and values.

    A chunk's own keys and values stand in the exact run's slot while it is computed, and no longer: a method that
    decides per chunk computes all of them whenever it computes any.

    Args:
        leader: the exact run.
        config: of the method.

    Raises:
        ValueError: the method decides per token, or compresses keys and values.
    """

    def __init__(self, leader: LeadingDenoiser, config: MotionCacheConfig) -> None:
        if config.token_level or config.kv_budget is not None:
            raise ValueError(f"{config.tag}: given history, whole chunks are cached and all keys and values kept")
        super().__init__(leader.transformer, leader.captions, leader.plan, config)
        self._leader = leader
        self.caches = leader.caches
        self._sampler: Magi1Sampler | None = None

    @property
    def latents(self) -> Tensor:
        """`[1, channels, latent frames, height, width]` float32."""
        return self._sampler.latents

    def begin(self, calls: Sequence[ChunkCall], latents: Sequence[Tensor]) -> None:
        """Take over the noise of the chunks that begin."""
        for call, noise in zip(calls, latents, strict=True):
            if self._sampler is None:
                shape = (*noise.shape[:2], self.plan.latent_frames, *noise.shape[3:])
                self._sampler = Magi1Sampler(self.plan, torch.zeros(shape, device=noise.device))
            if call.step == 0:
                self._frames(call.chunk).copy_(noise)

    def step(self, calls: Sequence[ChunkCall]) -> None:
        """Take an iteration of the exact run, given its denoising forwards."""
        if not calls:
            return
        velocities = self._sampler.velocities(self, calls)
        sizes = {call.chunk: call.dt for call in calls if call.role is Role.DENOISE}
        for chunk, velocity in velocities.items():
            self._frames(chunk).add_(velocity * sizes[chunk])

    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`), which leaves the exact run's keys and values as they were."""
        if call.role is Role.NEAR or call.branch is Pass.UNCOND:
            return super().predict(call, latents)
        cache, size = self.caches[call.branch.value], self._leader._chunk_tokens
        chunk = (call.chunk * size, (call.chunk + 1) * size)
        own = [tuple(rows.clone() for rows in layer.see(*chunk)) for layer in cache.look(*chunk)]
        velocity = super().predict(call, latents)
        for layer, before in zip(cache.look(*chunk), own, strict=True):
            for rows, saved in zip(layer.see(*chunk), before, strict=True):
                rows.copy_(saved)
        return velocity

    def _frames(self, chunk: int) -> Tensor:
        width = self.plan.config.chunk_width
        return self.latents[:, :, chunk * width : (chunk + 1) * width]
