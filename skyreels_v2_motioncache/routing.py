"""Lets the stock transformer's forward run on one chunk, with the engine in place of its loop over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Stack = Callable[..., Tensor]


class _RoutedBlocks(nn.ModuleList):
    """The model's own blocks, but a loop over them meets a single callable: the whole stack."""

    def __init__(self, blocks: nn.ModuleList, stack: Stack) -> None:
        super().__init__(blocks)
        self._stack = stack

    def __iter__(self) -> Iterator[Stack]:
        return iter([self._stack])


class _ChunkRotary(nn.Module):
    """Rotary tables of the chunk's own frames, where the stock module gives those of frames 0, 1, 2 …"""

    def __init__(self, rope: nn.Module, first_frame: int) -> None:
        super().__init__()
        self.rope = rope
        self.first_frame = first_frame

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        frames = hidden_states.shape[2]
        # The stock module reads nothing but the shape; an expanded view asks for more frames at no cost.
        up_to_chunk = hidden_states[:1, :1, :1].expand(-1, -1, self.first_frame + frames, -1, -1)
        cos, sin = self.rope(up_to_chunk)
        tokens = cos.shape[1] // (self.first_frame + frames) * frames
        return cos[:, -tokens:], sin[:, -tokens:]


@contextmanager
def chunk_routing(transformer: nn.Module, stack: Stack, first_frame: int) -> Iterator[None]:
    """Inside, `transformer`'s own forward treats its input as one chunk of a longer window.

    Args:
        transformer: a `SkyReelsV2Transformer3DModel`. Its blocks, rotary module and causal block size are exchanged for
            the time of the context: a single chunk needs no causal mask, and the stock forward builds none for size 1.
        stack: called with the arguments of a block, in place of all blocks.
        first_frame: position of the chunk's first latent frame in the window.
    """
    blocks, rope = transformer.blocks, transformer.rope
    causal_block = transformer.config.num_frame_per_block
    transformer.blocks = _RoutedBlocks(blocks, stack)
    transformer.rope = _ChunkRotary(rope, first_frame)
    transformer._set_ar_attention(1)
    try:
        yield
    finally:
        transformer.blocks, transformer.rope = blocks, rope
        transformer._set_ar_attention(causal_block)
