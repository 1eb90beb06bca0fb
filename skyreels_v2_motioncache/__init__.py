"""MotionCache for SkyReels-V2, on diffusers' own model and pipelines."""

from common.cache import MotionCacheConfig
from skyreels_v2_motioncache.adapter import MotionCacheHandle, apply_motioncache, remove_motioncache

__all__ = ["MotionCacheConfig", "MotionCacheHandle", "apply_motioncache", "remove_motioncache"]
