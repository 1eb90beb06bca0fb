"""What the sampler asks for a chunk's velocity, and the exact answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.kv_cache import ChunkKVCache, ChunkKVView, OwnKeysOnly
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.transformer import ChunkInputs, Magi1Transformer3DModel


class Denoiser(Protocol):
    """Answers the forwards of a plan, in the plan's order."""

    def start_iteration(self, calls: Sequence[ChunkCall], latents: Sequence[Tensor]) -> None:
        """The forwards that `predict` will be called with next, and the latents of each."""
        ...

    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk; both `[1, channels, chunk width, height, width]` fp32.

        For clean and prefix chunks only the keys and values it keeps matter.
        """
        ...

    def release(self, before_chunk: int) -> None:
        """No later forward attends to the chunks before `before_chunk`."""
        ...


class ExactDenoiser:
    """Runs every forward it is asked for, all tokens of it.

    Caching policies override `run_blocks`, where a chunk's tokens are about to enter the block stack.

    Args:
        transformer: the model.
        captions: captions of the video's chunks.
        plan: the forwards of the video.
    """

    def __init__(self, transformer: Magi1Transformer3DModel, captions: ChunkCaptions, plan: SamplingPlan) -> None:
        self.transformer = transformer
        self.captions = captions
        self.plan = plan
        self.caches = {branch: ChunkKVCache() for branch in (Pass.TEXT, Pass.NULL)}

    def start_iteration(self, calls: Sequence[ChunkCall], latents: Sequence[Tensor]) -> None:
        """Nothing to prepare."""

    @torch.no_grad()
    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`)."""
        inputs = self.prepare(call, latents)
        return self.finish(call, inputs, self.run_blocks(call, inputs))

    @torch.no_grad()
    def prepare(self, call: ChunkCall, latents: Tensor) -> ChunkInputs:
        """What enters the block stack for one chunk's latents `[1, channels, chunk width, height, width]`."""
        return self.transformer.prepare(
            latents,
            torch.full((1,), call.t, dtype=torch.float32, device=latents.device),
            self.captions.tokens(call),
            first_frame=call.position * self.plan.config.chunk_width,
            has_text=call.branch is Pass.TEXT,
            shortcut=call.shortcut,
        )

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk: `[1, tokens, hidden]`."""
        return self.transformer.run_blocks(inputs, self.keys_values(call))

    def finish(self, call: ChunkCall, inputs: ChunkInputs, hidden: Tensor) -> Tensor:
        """Velocity `[1, channels, frames, height, width]` from the block stack's outputs."""
        return self.transformer.unpatchify(self.transformer.head(hidden), inputs.grid)

    def keys_values(self, call: ChunkCall, rows: Tensor | None = None) -> ChunkKVView | OwnKeysOnly:
        """What the chunk attends to, and where its keys go.

        Args:
            call: the forward.
            rows: `[count]` indices when only some of the chunk's tokens are run.
        """
        if call.role is Role.NEAR or call.branch is Pass.UNCOND:
            return OwnKeysOnly()
        own, history = self.caches[call.branch], self.caches[self.plan.keeping_pass]
        if own is not history:
            own.drop_before(call.own_from)
        return ChunkKVView(
            own=own,
            history=history,
            chunk=call.chunk,
            start=call.kv_start,
            own_from=call.own_from,
            rows=rows,
            final=own is history and call.role in (Role.CLEAN, Role.PREFIX),
        )

    def release(self, before_chunk: int) -> None:
        """Free the keys and values of chunks that no later forward attends to."""
        for cache in self.caches.values():
            cache.drop_before(before_chunk)
