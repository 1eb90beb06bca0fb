"""Which clean K/V are worth keeping: FlowCache's compression (arXiv 2602.10825, section 3.3), per KV head.

A key matters when recent queries attend to it, and less so when other keys resemble it. Keys are scored as they are
stored, with their rotary positions in them; kept ones move to other rows but are never rotated again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.cache.config import MotionCacheConfig

IMPORTANCE_SHARE = 0.07  # λ: the rest of the score is (negated) redundancy
POOLING = 7  # neighbours of an important key are kept with it
QUERY_BLOCK = 128  # queries scored at a time: bounds the memory of the attention map


@dataclass(frozen=True)
class Compression:
    """Cuts the clean K/V of one branch down to a budget.

    Attributes:
        chunks: chunks' worth of tokens to keep per KV head.
        chunk: tokens of a chunk.
        group: neighbouring tokens that are kept or dropped together: 1, a frame's or a chunk's.
    """

    chunks: int
    chunk: int
    group: int

    @classmethod
    def of(cls, config: MotionCacheConfig, grid: tuple[int, int, int]) -> Compression | None:
        """What a config asks for, for chunks of `grid` (frames, rows, columns); None keeps everything."""
        if config.method == "exact" or config.kv_budget is None:
            return None
        frames, rows, columns = grid
        chunk = frames * rows * columns
        group = {"token": 1, "frame": rows * columns, "chunk": chunk}[config.kv_granularity]
        return cls(config.kv_budget, chunk, group)

    @property
    def budget(self) -> int:
        """Tokens to keep per KV head."""
        return self.chunks * self.chunk

    def select(self, query: Tensor, key: Tensor) -> Tensor:
        """The tokens to keep.

        Args:
            query: `[batch, queries, query heads, head dim]`, rotated, of the newest clean chunk.
            key: `[batch, tokens, kv heads, head dim]`, rotated, of all clean chunks in order; more than the budget.

        Returns:
            `[batch, kv heads, budget]` int64, ascending, so that kept tokens stay in the video's order.
        """
        scores = IMPORTANCE_SHARE * importance(query, key) - (1 - IMPORTANCE_SHARE) * redundancy(key)
        grouped = scores.unflatten(-1, (-1, self.group)).mean(-1)
        best = grouped.topk(self.budget // self.group, dim=-1).indices.sort(-1).values
        within = torch.arange(self.group, device=key.device)
        return (best.unsqueeze(-1) * self.group + within).flatten(-2)


def importance(query: Tensor, key: Tensor) -> Tensor:
    """Attention that keys get: per query the softmax over keys of the largest score in the head group, then the mean
    over queries, then a max-pool over neighbouring keys.

    Args:
        query: `[batch, queries, query heads, head dim]`; heads of one group are adjacent.
        key: `[batch, tokens, kv heads, head dim]`.

    Returns:
        `[batch, kv heads, tokens]` float32.
    """
    heads = key.shape[2]
    groups = query.shape[2] // heads
    keys = key.permute(0, 2, 3, 1)
    total = torch.zeros(key.shape[0], heads, key.shape[1], device=key.device)
    for block in query.split(QUERY_BLOCK, dim=1):
        folded = block.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = (folded @ keys).float().unflatten(2, (groups, -1)).amax(dim=2) * query.shape[-1] ** -0.5
        total += scores.softmax(-1).sum(dim=2)
    return F.max_pool1d(total / query.shape[1], POOLING, stride=1, padding=POOLING // 2)


def redundancy(key: Tensor) -> Tensor:
    """How much a key resembles the others: softmax over tokens of the row means of their cosine similarities.

    The row mean of the similarity matrix with a zero diagonal is `k̂ᵢ·(Σⱼk̂ⱼ - k̂ᵢ)/n`, which needs no such matrix.

    Args:
        key: `[batch, tokens, kv heads, head dim]`.

    Returns:
        `[batch, kv heads, tokens]` float32.
    """
    unit = F.normalize(key.float(), dim=-1)
    others = unit.sum(dim=1, keepdim=True) - unit
    return ((unit * others).sum(-1) / key.shape[1]).transpose(1, 2).softmax(-1)


def gather(rows: Tensor, kept: Tensor) -> Tensor:
    """Rows `[batch, tokens, kv heads, width]` of the tokens that each head keeps, `[batch, kept, kv heads, width]`."""
    index = kept.to(rows.device).transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1])
    return rows.gather(1, index)
