"""Lets the stock transformer's forward run on one chunk, with the engine in place of its loop over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

Stack = Callable[..., Tensor]


@dataclass
class Route:
    """What the transformer's forward does instead of what it is built for, set before each call of it.

    Attributes:
        blocks: the transformer's own.
        stack: called with the arguments of a block, in place of all blocks.
        first_frame: position of the chunk's first latent frame in the window.
    """

    blocks: list[nn.Module]
    stack: Stack | None = None
    first_frame: int = 0


class _RoutedBlocks(nn.ModuleList):
    """The model's own blocks, but a loop over them meets a single callable: the whole stack."""

    def __init__(self, route: Route) -> None:
        super().__init__(route.blocks)
        self._route = route

    def __iter__(self) -> Iterator[Stack]:
        return iter([self._route.stack])


class _ChunkRotary(nn.Module):
    """Rotary tables of the chunk's own frames, where the stock module gives those of frames 0, 1, 2 …"""

    def __init__(self, rope: nn.Module, route: Route) -> None:
        super().__init__()
        self.rope = rope
        self._route = route

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        frames, first_frame = hidden_states.shape[2], self._route.first_frame
        # The stock module reads nothing but the shape; an expanded view asks for more frames at no cost.
        up_to_chunk = hidden_states[:1, :1, :1].expand(-1, -1, first_frame + frames, -1, -1)
        cos, sin = self.rope(up_to_chunk)
        tokens = cos.shape[1] // (first_frame + frames) * frames
        return cos[:, -tokens:], sin[:, -tokens:]


@contextmanager
def chunk_routing(transformer: nn.Module) -> Iterator[Route]:
    """Inside, `transformer`'s own forward treats its input as one chunk of a longer window, as the route says.

    Args:
        transformer: a `SkyReelsV2Transformer3DModel`. Its blocks, rotary module and causal block size are exchanged for
            the time of the context: a single chunk needs no causal mask, and the stock forward builds none for size 1.
    """
    blocks, rope = transformer.blocks, transformer.rope
    causal_block = transformer.config.num_frame_per_block
    route = Route(list(blocks))
    transformer.blocks, transformer.rope = _RoutedBlocks(route), _ChunkRotary(rope, route)
    transformer._set_ar_attention(1)
    try:
        yield route
    finally:
        transformer.blocks, transformer.rope = blocks, rope
        route.stack = None  # which holds the window's tensors
        transformer._set_ar_attention(causal_block)
