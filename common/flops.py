"""FLOPs from traces. A multiply-add counts 2; matrix products only, attention on the keys that are attended to."""

from __future__ import annotations

from dataclasses import dataclass

from common.cache import Record, Trace


@dataclass(frozen=True)
class ModelCost:
    """What a block-causal video transformer costs, in FLOPs for one sample of a batch.

    Attributes:
        linear_per_token: projections and feed-forward of all blocks, per computed token.
        attention_per_pair: QKᵀ and PV of self-attention in all blocks, per query and key.
        cross_per_token: QKᵀ and PV of cross-attention in all blocks, per computed token.
        edge_per_token: patch embedding and output head, per token of a chunk, computed or not.
        per_call: time embedding, once per call of the model, and the text projection where each call repeats it.
        prompt: K/V projections of the prompt in all blocks, and its text projection if kept; once per branch.
    """

    linear_per_token: float
    attention_per_pair: float
    cross_per_token: float
    edge_per_token: float
    per_call: float = 0.0
    prompt: float = 0.0

    def blocks(self, tokens: int, kv_tokens: float) -> float:
        """The block stack on `tokens` queries that attend to `kv_tokens` keys each."""
        return tokens * (self.linear_per_token + self.cross_per_token + kv_tokens * self.attention_per_pair)

    def record_flops(self, record: Record) -> float:
        """One chunk's call as it was executed."""
        return self.blocks(record.tokens, record.kv_tokens) + record.tokens_total * self.edge_per_token + self.per_call

    def trace_flops(self, trace: Trace) -> float:
        """A whole video. What depends on the prompt alone is computed once per branch."""
        branches = {r.branch for r in trace.records}
        return sum(map(self.record_flops, trace.records)) + len(branches) * self.prompt

    def window_forward(self, chunks: int, chunk_tokens: int) -> float:
        """One forward over a window as the stock model counts it: block-causal area, prompt K/V anew."""
        rows = sum(self.blocks(chunk_tokens, (c + 1) * chunk_tokens) for c in range(chunks))
        return rows + chunks * chunk_tokens * self.edge_per_token + self.per_call + self.prompt
