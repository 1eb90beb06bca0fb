"""The published models: sizes, sampling options, and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from magi1_motioncache.config import SamplingConfig

TRANSFORMER_4_5B: dict[str, Any] = {
    "hidden_size": 3072,
    "num_layers": 34,
    "num_attention_heads": 24,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 12288,
}
TRANSFORMER_24B: dict[str, Any] = {
    "hidden_size": 6144,
    "num_layers": 48,
    "num_attention_heads": 48,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 16384,
    "gated_linear_unit": True,
    "in_channels": 32,
    "out_channels": 32,
    "half_channel_vae": True,
    "x_rescale_factor": 0.1,
}


@dataclass(frozen=True)
class Variant:
    """One published checkpoint.

    Attributes:
        transformer: arguments of `Magi1Transformer3DModel`.
        sampling: options it is sampled with.
        height, width: frame size of its configuration, in pixels.
        weights: folder of its tensors inside the variant's own folder.
    """

    transformer: dict[str, Any]
    sampling: SamplingConfig
    height: int
    width: int
    weights: str


def _variant(transformer: dict[str, Any], steps: int, distill: bool, quantised: bool, width: int) -> Variant:
    sampling = SamplingConfig(num_steps=steps, distill=distill, cfg_number=1 if distill else 3)
    weights = "inference_weight" + (".fp8" if quantised else "") + (".distill" if distill else "")
    return Variant(transformer, sampling, 720, width, weights)


VARIANTS: dict[str, Variant] = {
    "4.5B_base": _variant(TRANSFORMER_4_5B, 64, distill=False, quantised=False, width=720),
    "4.5B_distill": _variant(TRANSFORMER_4_5B, 64, distill=True, quantised=False, width=720),
    "4.5B_distill_quant": _variant(TRANSFORMER_4_5B, 64, distill=True, quantised=True, width=720),
    "24B_base": _variant(TRANSFORMER_24B, 32, distill=False, quantised=False, width=1280),
    "24B_distill": _variant(TRANSFORMER_24B, 16, distill=True, quantised=False, width=1280),
    "24B_distill_quant": _variant(TRANSFORMER_24B, 16, distill=True, quantised=True, width=1280),
}


def variant(name: str) -> Variant:
    """A published checkpoint by name.

    Raises:
        UserError: unknown name.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown MAGI-1 variant {name!r}; known are {', '.join(VARIANTS)}")
    return VARIANTS[name]
