"""The layers: attention and MLP, each gated by the chunk's condition and normalised before it joins the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magi1_motioncache.attention import Caption, ParallelAttention
from magi1_motioncache.kv_cache import LayerStore
from magi1_motioncache.norms import EPS, LayerNorm1p


class Gates(nn.Module):
    """One vector per chunk -> one multiplier per channel for the attention and one for the MLP."""

    def __init__(self, condition: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList([nn.Linear(condition, 2 * hidden)])

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, 1, condition]` -> two of `[batch, 1, hidden]`, between -1 and 1."""
        gates = self.proj[0](F.silu(condition))
        return torch.tanh(gates.float()).to(gates.dtype).chunk(2, dim=-1)


class FeedForward(nn.Module):
    """Layer norm, two linears and GELU, or SwiGLU when `gated`."""

    def __init__(self, hidden: int, inner: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.layer_norm = nn.LayerNorm(hidden, eps=EPS)
        self.linear_fc1 = nn.Linear(hidden, 2 * inner if gated else inner, bias=False)
        self.linear_fc2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` -> same."""
        inner = self.linear_fc1(self.layer_norm(hidden))
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = (F.silu(gate.float()) * up.float()).to(inner.dtype)
        else:
            inner = F.gelu(inner)
        return self.linear_fc2(inner)


class Layer(nn.Module):
    """Parallel attention and MLP. There is no adaptive shift or scale: the condition acts through the gates alone."""

    def __init__(
        self,
        hidden: int,
        condition: int,
        text_hidden: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        gated: bool,
    ) -> None:
        super().__init__()
        self.ada_modulate_layer = Gates(condition, hidden)
        self.self_attention = ParallelAttention(hidden, text_hidden, query_heads, kv_heads, head_dim)
        self.self_attn_post_norm = LayerNorm1p(hidden)
        self.mlp = FeedForward(hidden, inner, gated)
        self.mlp_post_norm = LayerNorm1p(hidden)

    def forward(self, hidden: Tensor, condition: Tensor, caption: Caption, rope: Tensor, store: LayerStore) -> Tensor:
        """One layer for the given tokens of one chunk.

        Args:
            hidden: `[batch, tokens, hidden]`, compute dtype.
            condition: `[batch, 1, condition]`, compute dtype.
            caption: this layer's.
            rope: `[tokens, 6 * bands]` fp32.
            store: takes this layer's new K/V, returns those to attend to.

        Returns:
            `[batch, tokens, hidden]`, compute dtype.
        """
        attention_gate, mlp_gate = self.ada_modulate_layer(condition)
        update = self.self_attention(hidden, caption, rope, store)
        hidden = _add_gated(hidden, update, attention_gate, self.self_attn_post_norm)
        return _add_gated(hidden, self.mlp(hidden), mlp_gate, self.mlp_post_norm)


def _add_gated(hidden: Tensor, update: Tensor, gate: Tensor, norm: LayerNorm1p) -> Tensor:
    return (norm(update.float() * gate.float()) + hidden.float()).to(hidden.dtype)


class LayerStack(nn.Module):
    """All layers and the norm that follows them."""

    def __init__(self, layers: list[Layer], hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_layernorm = LayerNorm1p(hidden)
