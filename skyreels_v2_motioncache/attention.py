"""Attention processors that route a chunk's K/V through the cache. Outside a chunk's call they step aside."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.attention import attend
from common.cache import KVCache, Write


@dataclass
class ChunkCall:
    """Where the running chunk's K/V go, shared by the processors of all layers. `write` is None outside a call.

    Attributes:
        kv: K/V of the running branch.
        write: rows that this call writes.
        final: whether it makes the chunk's K/V final, after which clean K/V may be compressed.
        prompt_kv: per layer, K/V of the branch's prompt for cross-attention; filled at the first use.
    """

    kv: KVCache | None = None
    write: Write | None = None
    final: bool = False
    prompt_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class _Processor:
    """What diffusers expects of an attention processor, with the stock one behind it."""

    _parallel_config = None

    def __init__(self, stock, layer: int, call: ChunkCall) -> None:
        self.stock = stock
        self.layer = layer
        self.call = call
        self._attention_backend = stock._attention_backend

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention through the backend chosen with `set_attention_backend`, if any."""
        return attend(query, key, value, self._attention_backend).flatten(2, 3).type_as(query)


class CachedSelfAttention(_Processor):
    """Self-attention of a chunk's tokens, all or selected, to everything up to the chunk's end in the window."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        if self.call.write is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value))
        query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        key, value = self.call.kv.update(self.layer, key, value, self.call.write)
        out = self._attend(query, key, value)
        if self.call.final:
            self.call.kv.compress(self.layer, query, self.call.write)
        return attn.to_out[1](attn.to_out[0](out))


class CachedCrossAttention(_Processor):
    """Cross-attention to the prompt, whose K/V are projected once per prompt and branch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        if self.call.write is None or attn.add_k_proj is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        if self.layer not in self.call.prompt_kv:
            if attn.fused_projections:
                key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(key), value))
            self.call.prompt_kv[self.layer] = (key, value)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = self._attend(query, *self.call.prompt_kv[self.layer])
        return attn.to_out[1](attn.to_out[0](out))


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """SkyReels-V2's rotary tables as one complex number per channel pair, made once for all layers.

    Args:
        cos, sin: `[1, tokens, 1, head dim]`, each value twice in a row.

    Returns:
        `[1, tokens, 1, head dim / 2]` complex64.
    """
    return torch.complex(cos[..., 0::2].float(), sin[..., 0::2].float())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of interleaved channel pairs, as SkyReels-V2 has it.

    A product of complex numbers is one pass over memory, where the same with sines and cosines takes eight.

    Args:
        x: `[batch, tokens, heads, head dim]`.
        table: `[1, tokens, 1, head dim / 2]` of the same tokens; the products are taken in its precision.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def install(transformer, call: ChunkCall) -> None:
    """Put cached processors in front of the stock ones of every block."""
    for layer, block in enumerate(transformer.blocks):
        block.attn1.set_processor(CachedSelfAttention(block.attn1.processor, layer, call))
        block.attn2.set_processor(CachedCrossAttention(block.attn2.processor, layer, call))


def uninstall(transformer) -> None:
    """Give the stock processors back, with the attention backend that was chosen meanwhile."""
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            cached = attn.processor
            cached.stock._attention_backend = cached._attention_backend
            attn.set_processor(cached.stock)
