"""Lets the stock transformer's forward run on one chunk, with the engine in place of its loop over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skyreels_v2_motioncache.attention import rotary_table

Stack = Callable[..., Tensor]


@dataclass
class Route:
    """What the transformer's forward does instead of what it is built for, set before each call of it.

    It lasts for a video, and so does what is the same at each of a video's many calls.

    Attributes:
        blocks: the transformer's own.
        stack: called with the arguments of a block, in place of all blocks.
        first_frame: position of the chunk's first latent frame in the window.
        level: the one timestep of all the chunk's frames; None where frames may differ, or it is not known beforehand.
        fps: frame rate classes as the pipeline gives them, for models that are told of it.
        text: the prompt as it was embedded by an earlier call, `[batch, text tokens, channels]`; None before.
        rate: what `fps` adds to the modulation, `[1, 6 * channels]`; None before the first call.
        times: by timestep, its embedding `[batch, channels]` and modulation `[batch, 6 * channels]`.
        tables: by first frame and number of frames, rotary tables as `rotary_table` makes them.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    stack: Stack | None = None
    first_frame: int = 0
    level: float | None = None
    fps: Any = None
    text: Tensor | None = None
    rate: Tensor | None = None
    times: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tables: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class _RoutedBlocks(nn.ModuleList):
    """The model's own blocks, but a loop over them meets a single callable: the whole stack."""

    def __init__(self, route: Route) -> None:
        super().__init__(route.blocks)
        self._route = route

    def __iter__(self) -> Iterator[Stack]:
        return iter([self._route.stack])


class _ChunkRotary(nn.Module):
    """The rotary table of the chunk's own frames, where the stock module gives those of frames 0, 1, 2 …"""

    def __init__(self, rope: nn.Module, route: Route) -> None:
        super().__init__()
        self.rope = rope
        self._route = route

    def forward(self, hidden_states: Tensor) -> Tensor:
        frames, first_frame = hidden_states.shape[2], self._route.first_frame
        tables = self._route.tables
        if (first_frame, frames) not in tables:
            # The stock module reads nothing but the shape; an expanded view asks for more frames at no cost.
            up_to_chunk = hidden_states[:1, :1, :1].expand(-1, -1, first_frame + frames, -1, -1)
            cos, sin = self.rope(up_to_chunk)
            tokens = cos.shape[1] // (first_frame + frames) * frames
            tables[first_frame, frames] = rotary_table(cos[:, -tokens:], sin[:, -tokens:])
        return tables[first_frame, frames]


class _ChunkConditions(nn.Module):
    """Embeds a timestep once for all chunks and guidance passes that come to it, and a prompt once for all calls.

    It adds the frame rate as well: the stock forward brings it from the host at each call, and waits for that.
    """

    def __init__(self, transformer: nn.Module, route: Route) -> None:
        super().__init__()
        self.embedder = transformer.condition_embedder
        self.rates = None
        if transformer.config.inject_sample_info:
            self.rates = nn.Sequential(transformer.fps_embedding, transformer.fps_projection)
        self._route = route

    def forward(
        self, timestep: Tensor, text: Tensor, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        route = self._route
        if image is None and route.text is not None and route.level in route.times:
            return *route.times[route.level], route.text, None
        embedding, modulation, text, image = self.embedder(timestep, text, image)
        if self.rates is not None:
            if route.rate is None:
                fps = torch.tensor(route.fps, dtype=torch.long, device=modulation.device).flatten()
                route.rate = self.rates(fps[:1])  # the same for all samples of a batch
            modulation = modulation + route.rate
        if route.level is not None:
            route.times[route.level] = embedding, modulation
        return embedding, modulation, text, image


@contextmanager
def chunk_routing(transformer: nn.Module, route: Route) -> Iterator[None]:
    """Inside, `transformer`'s own forward treats its input as one chunk of a longer window, as the route says.

    Args:
        transformer: a `SkyReelsV2Transformer3DModel`. Its blocks, rotary module, condition embedder, causal block size
            and frame rate option are exchanged for the time of the context: a single chunk needs no causal mask, and
            the stock forward builds none for size 1.
        route: of the video in the making.
    """
    blocks, rope, embedder = transformer.blocks, transformer.rope, transformer.condition_embedder
    causal_block, tells_rate = transformer.config.num_frame_per_block, transformer.config.inject_sample_info
    route.blocks = list(blocks)
    transformer.blocks, transformer.rope = _RoutedBlocks(route), _ChunkRotary(rope, route)
    transformer.condition_embedder = _ChunkConditions(transformer, route)
    transformer.register_to_config(num_frame_per_block=1, inject_sample_info=False)
    try:
        yield
    finally:
        transformer.blocks, transformer.rope, transformer.condition_embedder = blocks, rope, embedder
        route.stack = None  # which holds the window's tensors
        transformer.register_to_config(num_frame_per_block=causal_block, inject_sample_info=tells_rate)
