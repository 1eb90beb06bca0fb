"""What the sampler asks for a chunk's velocity, and the exact answer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from magi1_motioncache.attention import KeyValueStore
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.kv_cache import ChunkKVCache, ChunkKVView, OwnKeysOnly
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.transformer import ChunkInputs, Magi1Transformer3DModel


class Denoiser(Protocol):
    """Answers the forwards of a plan, in the plan's order."""

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

    @torch.no_grad()
    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`)."""
        model = self.transformer
        inputs = model.prepare(
            latents,
            torch.tensor([call.t], dtype=torch.float32, device=latents.device),
            self.captions.tokens(call),
            first_frame=call.position * self.plan.config.chunk_width,
            has_text=call.branch is Pass.TEXT,
            shortcut=call.shortcut,
        )
        return self.finish(call, inputs, self.run_blocks(call, inputs))

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk: `[1, tokens, hidden]`."""
        return self.transformer.run_blocks(inputs, self.keys_values(call))

    def finish(self, call: ChunkCall, inputs: ChunkInputs, hidden: Tensor) -> Tensor:
        """Velocity `[1, channels, frames, height, width]` from the block stack's outputs."""
        return self.transformer.unpatchify(self.transformer.head(hidden), inputs.grid)

    def keys_values(self, call: ChunkCall, rows: Tensor | None = None) -> KeyValueStore:
        """What the chunk attends to, and where its keys go.

        Args:
            call: the forward.
            rows: `[count]` indices when only some of the chunk's tokens are run.
        """
        if call.role is Role.NEAR or call.branch is Pass.UNCOND:
            return OwnKeysOnly()
        return ChunkKVView(
            own=self.caches[call.branch],
            history=self.caches[self.plan.keeping_pass],
            chunk=call.chunk,
            start=call.kv_start,
            own_from=call.own_from,
            rows=rows,
        )

    def release(self, before_chunk: int) -> None:
        """Free the keys and values of chunks that no later forward attends to."""
        for cache in self.caches.values():
            cache.drop_before(before_chunk)
