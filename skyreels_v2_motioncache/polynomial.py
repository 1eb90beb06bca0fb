"""TeaCache's rescaling polynomials, fitted to the published SkyReels-V2 diffusion-forcing models."""

from __future__ import annotations

from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel

from common.cache import MotionCacheConfig

# Highest power first, by width and number of blocks; those that the public SkyReels-V2 code pairs with five retention
# steps. MotionCache and FlowCache use them too. They go negative near zero, as published.
POLYNOMIALS: dict[tuple[int, int], tuple[float, ...]] = {
    (1536, 30): (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),  # 1.3B
    (5120, 40): (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),  # 14B
}


def with_polynomial(config: MotionCacheConfig, transformer: SkyReelsV2Transformer3DModel) -> MotionCacheConfig:
    """`config` with this model's polynomial, if it measures the modulation, has none, and the model is a known one."""
    if config.distance != "modulation" or config.polynomial is not None:
        return config
    sizes = transformer.config
    known = POLYNOMIALS.get((sizes.num_attention_heads * sizes.attention_head_dim, sizes.num_layers))
    return config.replace(polynomial=known)
