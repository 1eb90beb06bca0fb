"""FLOPs of SkyReels-V2, from a transformer's modules (on any device, the meta device included)."""

from __future__ import annotations

from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from torch import nn

from common.flops import ModelCost


def model_cost(transformer: SkyReelsV2Transformer3DModel, text_tokens: int = 512) -> ModelCost:
    """What one token, one call and one prompt cost.

    Args:
        transformer: the model; only its modules' shapes are read.
        text_tokens: length that prompts are padded to (`max_sequence_length` of the pipeline).
    """
    blocks = transformer.blocks
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    embedder = transformer.condition_embedder
    per_token, prompt = 0.0, text_tokens * _linears(embedder.text_embedder)
    for block in blocks:
        prompt += text_tokens * (_linear(block.attn2.to_k) + _linear(block.attn2.to_v))
        on_tokens = [block.attn1, block.attn2.to_q, block.attn2.to_out, block.ffn]
        per_token += sum(_linears(module) for module in on_tokens)
    time = _linears(embedder.time_embedder) + _linear(embedder.time_proj)
    fps = _linears(transformer.fps_projection) if transformer.config.inject_sample_info else 0.0
    patch = 2.0 * transformer.patch_embedding.weight.numel()
    return ModelCost(
        linear_per_token=per_token,
        attention_per_pair=4.0 * width * len(blocks),
        cross_per_token=4.0 * width * len(blocks) * text_tokens,
        edge_per_token=patch + _linear(transformer.proj_out),
        per_call=time + fps,
        prompt=prompt,
    )


def _linear(module: nn.Linear) -> float:
    return 2.0 * module.weight.numel()


def _linears(module: nn.Module) -> float:
    return sum(_linear(m) for m in module.modules() if isinstance(m, nn.Linear))
