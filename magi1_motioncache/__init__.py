"""MAGI-1 in diffusers' style: transformer, autoencoder, sampler and pipeline, one chunk at a time.

The model knows no caching method: a `Denoiser` decides what is run, and `apply_motioncache` puts a caching one in.
"""

from importlib import import_module
from typing import Any

MODULES = {
    "AutoencoderViTMagi1": "vae",
    "ChunkCall": "plan",
    "ChunkCaptions": "captions",
    "Denoiser": "denoiser",
    "ExactDenoiser": "denoiser",
    "FinishedChunk": "sampler",
    "Magi1Pipeline": "pipeline",
    "Magi1Sampler": "sampler",
    "Magi1Transformer3DModel": "transformer",
    "MotionCacheConfig": "attach",
    "MotionCacheHandle": "attach",
    "Pass": "plan",
    "Role": "plan",
    "SamplingConfig": "config",
    "SamplingPlan": "plan",
    "SpecialTokenOptions": "special_tokens",
    "SpecialTokens": "special_tokens",
    "apply_motioncache": "attach",
    "cache_preset": "cache_presets",
    "remove_motioncache": "attach",
}
__all__ = sorted(MODULES)


def __getattr__(name: str) -> Any:
    # The model imports diffusers, which takes seconds: a command's help and its errors should not wait for that.
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
