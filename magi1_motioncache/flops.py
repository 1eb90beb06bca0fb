"""Floating point operations of forwards, a multiply-add counted as two; elementwise work is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.cache import Trace
from magi1_motioncache.captions import NULL_TOKENS
from magi1_motioncache.embeddings import SINUSOID_WIDTH
from magi1_motioncache.plan import Pass, Role
from magi1_motioncache.transformer import PATCH


@dataclass(frozen=True)
class Flops:
    """Operations by part of the model.

    Attributes:
        linear: projections and MLP of the layers.
        self_attention: scores and weighted values over the key range.
        cross_attention: the same over the caption, and the caption's keys and values.
        embedders: everything outside the layers, and the gates.
    """

    linear: int = 0
    self_attention: int = 0
    cross_attention: int = 0
    embedders: int = 0

    @property
    def blocks(self) -> int:
        """Linears and self-attention, what grows with the video."""
        return self.linear + self.self_attention

    @property
    def total(self) -> int:
        """All that is forwarded."""
        return self.blocks + self.cross_attention + self.embedders


def forward_flops(
    config: Mapping[str, Any],
    tokens: int,
    keys: int,
    caption_tokens: int,
    distilled: bool,
    context_tokens: int | None = None,
    knows_caption: bool = False,
) -> Flops:
    """One forward of `tokens` tokens of a chunk.

    Args:
        config: the transformer's.
        tokens: queries: the chunk's tokens, or those of them that are computed; with 0 no layer runs.
        keys: keys attended to, own ones included.
        caption_tokens: tokens of the caption attended to.
        distilled: the step size is embedded too.
        context_tokens: tokens embedded and read out, when more than are computed; `tokens` by default.
        knows_caption: its text states, keys and values are there from an earlier forward.

    Returns:
        Operations of the forward.
    """
    hidden, layers = config["hidden_size"], config["num_layers"]
    query = config["num_attention_heads"] * config["kv_channels"]
    kv = config["num_query_groups"] * config["kv_channels"]
    condition = int(hidden * config["cond_hidden_ratio"])
    text = int(hidden * config["xattn_cond_hidden_ratio"])
    mlp = config["ffn_hidden_size"] * (3 if config["gated_linear_unit"] else 2)
    per_token = hidden * (2 * query + 2 * kv) + 2 * query * hidden + hidden * mlp
    ends = PATCH * PATCH * (config["in_channels"] + config["out_channels"]) * hidden
    times = (SINUSOID_WIDTH * condition + condition * condition) * (2 if distilled else 1)
    new_text = 0 if knows_caption else caption_tokens * text
    captions = config["caption_channels"] * (new_text + condition)
    layers = layers if tokens else 0
    gates = layers * condition * 2 * hidden
    return Flops(
        linear=2 * layers * tokens * per_token,
        self_attention=4 * layers * tokens * keys * query,
        cross_attention=layers * (4 * tokens * caption_tokens * query + 2 * new_text * 2 * kv),
        embedders=2 * ((tokens if context_tokens is None else context_tokens) * ends + times + captions + gates),
    )


def trace_flops(config: Mapping[str, Any], trace: Trace, text_tokens: int, distilled: bool) -> int:
    """Operations of what a trace records, all that is forwarded: each chunk's caption once, that of no text once.

    Args:
        config: the transformer's.
        trace: of a cached or exact run.
        text_tokens: tokens of the prompt's caption, special tokens included.
        distilled: whether the step size is embedded.
    """
    with_text = (Pass.TEXT.value, Role.NEAR.value)
    total, known = 0, set()
    for record in trace.records:
        uses_text = record.role == "denoise" and record.branch in with_text
        caption, chunk = (text_tokens, record.chunk) if uses_text else (NULL_TOKENS, None)
        sizes = record.tokens, record.kv_tokens, caption
        total += forward_flops(config, *sizes, distilled, record.tokens_total, chunk in known).total
        known.add(chunk)
    return total
