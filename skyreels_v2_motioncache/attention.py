"""Attention processors that route a chunk's K/V through the cache. Outside a chunk's call they step aside.

What they need of a call comes in the arguments of the stock block that it merely hands on: then a compiled block has
no layer's or chunk's values built in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.attention import attend
from common.cache import Write
from common.cache.kv import LayerKV
from common.errors import UserError


@dataclass
class Place:
    """Where one layer's K/V of the running chunk go; a block gets it in place of rotary tables.

    Attributes:
        table: the computed tokens' rotary embedding, see `rotary_table`.
        kv: the layer's K/V in the running branch.
        write: rows that this call writes.
        compress: whether clean K/V are to be compressed after it.
    """

    table: Tensor
    kv: LayerKV
    write: Write
    compress: bool


@dataclass
class Prompt:
    """A branch's prompt for one layer; a block gets it in place of text embeddings.

    Attributes:
        text: `[batch, text tokens, channels]`.
        kv: its K and V, projected at the first use.
    """

    text: Tensor
    kv: tuple[Tensor, Tensor] | None = None


class _Processor:
    """What diffusers expects of an attention processor, with the stock one behind it."""

    _parallel_config = None

    def __init__(self, stock) -> None:
        self.stock = stock
        self._attention_backend = stock._attention_backend

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention through the backend chosen with `set_attention_backend`, if any."""
        return attend(query, key, value, self._attention_backend).flatten(2, 3).type_as(query)


class CachedSelfAttention(_Processor):
    """Self-attention of a chunk's tokens, all or selected, to everything up to the chunk's end in the window."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        if not isinstance(rotary_emb, Place):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        place = rotary_emb
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value))
        query, key = rotate(query, place.table), rotate(key, place.table)
        key, value = place.kv.update(key, value, place.write)
        out = self._attend(query, key, value)
        if place.compress:
            place.kv.compress(query, place.write)
        return attn.to_out[0](out)  # its dropout has no part in sampling


class CachedCrossAttention(_Processor):
    """Cross-attention to the prompt, whose K/V are projected once per prompt and branch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        prompt = encoder_hidden_states
        if not isinstance(prompt, Prompt):
            return self.stock(attn, hidden_states, prompt, attention_mask, rotary_emb, **kwargs)
        if attn.add_k_proj is not None:
            return self.stock(attn, hidden_states, prompt.text, attention_mask, rotary_emb, **kwargs)
        if prompt.kv is None:
            if attn.fused_projections:
                key, value = attn.to_kv(prompt.text).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(prompt.text), attn.to_v(prompt.text)
            prompt.kv = (attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1)))
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = self._attend(query, *prompt.kv)
        return attn.to_out[0](out)  # its dropout has no part in sampling


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """SkyReels-V2's rotary tables as one cosine and sine per channel pair, made for all layers and steps.

    Args:
        cos, sin: `[1, tokens, 1, head dim]`, each value twice in a row.

    Returns:
        `[1, tokens, 1, head dim / 2, 2]` float32.
    """
    return torch.stack([cos[..., 0::2].float(), sin[..., 0::2].float()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of interleaved channel pairs, as SkyReels-V2 has it.

    Args:
        x: `[batch, tokens, heads, head dim]`.
        table: `[1, tokens, 1, head dim / 2, 2]` of the same tokens, see `rotary_table`; products are taken in float32.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # PyTorch's compiler makes one pass of this, and leaves complex numbers alone
        (first, second), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    else:  # a product of complex numbers is one pass over memory, where the same with sines and cosines takes eight
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).type_as(x)


def install(transformer) -> None:
    """Put cached processors in front of the stock ones of every block."""
    for block in transformer.blocks:
        block.attn1.set_processor(CachedSelfAttention(block.attn1.processor))
        block.attn2.set_processor(CachedCrossAttention(block.attn2.processor))


def uninstall(transformer) -> None:
    """Give the stock processors back, with the attention backend that was chosen meanwhile.

    Processors that were put in the place of ours stay.
    """
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            cached = attn.processor
            if isinstance(cached, _Processor):
                cached.stock._attention_backend = cached._attention_backend
                attn.set_processor(cached.stock)


def check_installed(transformer) -> None:
    """Raise a `UserError` if processors were exchanged since `install`: chunks cannot be told apart without ours."""
    if not all(isinstance(attn.processor, _Processor) for b in transformer.blocks for attn in (b.attn1, b.attn2)):
        raise UserError(
            "the transformer's attention processors were exchanged while the cache was attached; call "
            "remove_motioncache(pipe), then apply_motioncache again"
        )
