"""One layer's attention: a chunk to its range of chunks, and to its caption, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import attend
from magi1_motioncache.kv_cache import LayerStore
from magi1_motioncache.norms import EPS, LayerNorm1p
from magi1_motioncache.rope import rotate

TRAINING_RANKS = 8  # the weights of `linear_proj` follow the head order of the eight-way split they were trained with


@dataclass
class Caption:
    """A caption for one layer.

    Attributes:
        text: `[1, tokens, text hidden]`, compute dtype, no padding.
        kv: its K and V `[1, tokens, kv heads, head dim]` in that layer, projected at the first use.
    """

    text: Tensor
    kv: tuple[Tensor, Tensor] | None = None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Unmasked attention where several query heads share a key head.

    Without a mask, the query heads of one group are just more queries of their key head. Folding them into the sequence
    avoids copies of K and V and runs on every attention backend.

    Args:
        query: `[batch, queries, query heads, head dim]`; heads of one group are adjacent.
        key, value: `[batch, keys, kv heads, head dim]`.

    Returns:
        `[batch, queries, query heads * head dim]`.
    """
    batch, length, query_heads, width = query.shape
    heads = key.shape[2]
    groups = query_heads // heads
    folded = query.view(batch, length, heads, groups, width).transpose(2, 3).reshape(batch, -1, heads, width)
    out = attend(folded, key, value)
    return out.reshape(batch, length, groups, heads, width).transpose(2, 3).flatten(2)


def interleave(attended: Tensor, captioned: Tensor) -> Tensor:
    """Order the two attentions as `linear_proj` expects: slice 0 of both, slice 1 of both, ... of eight slices each.

    Args:
        attended, captioned: `[batch, tokens, width]`, self- and cross-attention.

    Returns:
        `[batch, tokens, 2 * width]`.
    """
    pair = torch.stack([part.unflatten(-1, (TRAINING_RANKS, -1)) for part in (attended, captioned)], dim=-2)
    return pair.flatten(2)


def linear_to_float(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` with fp32 accumulation and an fp32 result, whatever the dtype of the operands.

    On a GPU, half-precision operands go to the tensor cores: their products are exact in fp32, so upcasting both
    first would change nothing but the time.
    """
    if x.is_cuda and x.dtype == weight.dtype != torch.float32 and not torch.is_grad_enabled():
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return F.linear(x.float(), weight.float())


class NormedProjections(nn.Module):
    """Layer norm, then the queries of both attentions and the keys and values of the first, from the same input."""

    def __init__(self, hidden: int, query_width: int, kv_width: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden, eps=EPS)
        self.q = nn.Linear(hidden, query_width, bias=False)
        self.qx = nn.Linear(hidden, query_width, bias=False)
        self.k = nn.Linear(hidden, kv_width, bias=False)
        self.v = nn.Linear(hidden, kv_width, bias=False)


class ParallelAttention(nn.Module):
    """Self-attention over the K/V range and cross-attention to the caption, from one layer norm, joined by one linear.

    Args:
        hidden: channels of the residual stream.
        text_hidden: channels of the text states.
        query_heads, kv_heads, head_dim: sizes; `query_heads` is a multiple of `kv_heads`.
    """

    def __init__(self, hidden: int, text_hidden: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        query_width, kv_width = query_heads * head_dim, kv_heads * head_dim
        self.linear_qkv = NormedProjections(hidden, query_width, kv_width)
        self.linear_kv_xattn = nn.Linear(text_hidden, 2 * kv_width, bias=False)
        self.linear_proj = nn.Linear(2 * query_width, hidden, bias=False)
        self.q_layernorm = LayerNorm1p(head_dim)
        self.q_layernorm_xattn = LayerNorm1p(head_dim)
        self.k_layernorm = LayerNorm1p(head_dim)
        self.k_layernorm_xattn = LayerNorm1p(head_dim)

    def forward(self, hidden: Tensor, caption: Caption, rope: Tensor, store: LayerStore) -> Tensor:
        """Both attentions of the given tokens.

        Args:
            hidden: `[batch, tokens, hidden]`, compute dtype.
            caption: this layer's.
            rope: `[tokens, 6 * bands]` fp32, rows of the given tokens.
            store: takes this layer's new K/V, returns those to attend to.

        Returns:
            `[batch, tokens, hidden]` fp32.
        """
        normed = self.linear_qkv.layer_norm(hidden)
        query = self._positioned(self.linear_qkv.q(normed), self.q_layernorm, rope)
        key = self._positioned(self.linear_qkv.k(normed), self.k_layernorm, rope)
        attended = grouped_attention(query, *store.update(key, self._heads(self.linear_qkv.v(normed))))
        store.attended(query)
        captioned = self._attend_to_caption(normed, caption)
        return linear_to_float(interleave(attended, captioned), self.linear_proj.weight)

    def _attend_to_caption(self, normed: Tensor, caption: Caption) -> Tensor:
        query = self.q_layernorm_xattn(self._heads(self.linear_qkv.qx(normed)))
        if caption.kv is None:
            # K and V alternate per head in this matrix; they are not its two halves.
            key, value = self.linear_kv_xattn(caption.text).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
            caption.kv = self.k_layernorm_xattn(key), value
        return grouped_attention(query, *caption.kv)

    def _positioned(self, projected: Tensor, norm: LayerNorm1p, rope: Tensor) -> Tensor:
        heads = self._heads(projected)
        return rotate(norm(heads.float()), rope).to(heads.dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))
