"""What the sampler asks for a chunk's velocity, and the exact answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.cache import KVCache, Write
from magi1_motioncache.attention import Caption
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.kv_cache import ChunkView, OwnKeysOnly
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.transformer import PATCH, ChunkInputs, Magi1Transformer3DModel


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
        self.caches: dict[str, KVCache] = {}
        """By guidance pass, from its first forward on."""
        self._grid = (0, 0, 0)  # of a chunk's tokens, from the first forward on
        # What is the same at many forwards: captions and positions by chunk, conditions by time.
        self._captions: dict[int | None, list[Caption]] = {}
        self._positions: dict[int, Tensor] = {}
        self._conditions: dict[tuple[float, bool, float | None], Tensor] = {}

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
        self._grid = (latents.shape[2], latents.shape[3] // PATCH, latents.shape[4] // PATCH)
        model, has_text = self.transformer, call.branch is Pass.TEXT
        hidden = model.embed(latents)
        caption = call.chunk if call.uses_text else None
        if caption not in self._captions:
            self._captions[caption] = model.captions(self.captions.tokens(call))
        if call.position not in self._positions:
            self._positions[call.position] = model.rope(call.position * self._grid[0], *self._grid)
        condition = (call.t, has_text, call.shortcut)
        if condition not in self._conditions:
            time = torch.full((1,), call.t, dtype=torch.float32, device=latents.device)
            self._conditions[condition] = model.condition(time, has_text, call.shortcut)
        return ChunkInputs(
            hidden,
            self._positions[call.position],
            self._conditions[condition],
            self._captions[caption],
            self._grid,
        )

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk: `[1, tokens, hidden]`."""
        return self.transformer.run_blocks(inputs, self.keys_values(call))

    def finish(self, call: ChunkCall, inputs: ChunkInputs, hidden: Tensor) -> Tensor:
        """Velocity `[1, channels, frames, height, width]` from the block stack's outputs."""
        return self.transformer.unpatchify(self.transformer.head(hidden), inputs.grid)

    def keys_values(self, call: ChunkCall, tokens: Tensor | None = None) -> ChunkView | OwnKeysOnly:
        """What the chunk attends to, and where its keys go.

        Args:
            call: the forward, for which `prepare` was called.
            tokens: `[count]` indices when only some of the chunk's tokens are run.
        """
        if call.role is Role.NEAR or call.branch is Pass.UNCOND:
            return OwnKeysOnly()
        size = self._chunk_tokens
        start, seen_from = call.chunk * size, call.kv_start * size
        own = self.cache(call.branch.value)
        if call.branch is self.plan.keeping_pass:
            write = Write(start, size, tokens, seen_from)
            return ChunkView(own, write, final=call.role in (Role.CLEAN, Role.PREFIX))
        own.drop_before(call.own_from * size)
        border = min(max(call.own_from, call.kv_start), call.chunk) * size
        history = self.cache(self.plan.keeping_pass.value)
        return ChunkView(own, Write(start, size, tokens, border), history, seen_from)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Layers, their K/V heads and the channels of a head."""
        config = self.transformer.config
        return config.num_layers, config.num_query_groups, config.kv_channels

    @property
    def _chunk_tokens(self) -> int:
        return math.prod(self._grid)

    def cache(self, name: str) -> KVCache:
        """The cache of a guidance pass, made when it is first asked for."""
        if name not in self.caches:
            self.caches[name] = self.new_cache(self.plan.most_chunks(name) * self._chunk_tokens)
        return self.caches[name]

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache with room for so many rows."""
        return KVCache(*self._sizes, rows)

    def release(self, before_chunk: int) -> None:
        """Free what belongs to chunks that no later forward attends to."""
        for cache in self.caches.values():
            cache.drop_before(before_chunk * self._chunk_tokens)
        self._captions = {c: found for c, found in self._captions.items() if c is None or c >= before_chunk}
        # Passes that see no history have the positions of a first chunk.
        self._positions = {p: table for p, table in self._positions.items() if not 0 < p < before_chunk}
