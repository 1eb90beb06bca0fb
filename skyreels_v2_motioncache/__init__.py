"""MotionCache for SkyReels-V2, on diffusers' own model and pipelines."""

from typing import TYPE_CHECKING, Any

from common.cache import MotionCacheConfig

if TYPE_CHECKING:
    from skyreels_v2_motioncache.adapter import MotionCacheHandle, apply_motioncache, remove_motioncache

__all__ = ["MotionCacheConfig", "MotionCacheHandle", "apply_motioncache", "remove_motioncache"]


def __getattr__(name: str) -> Any:
    # The adapter imports diffusers, which takes seconds: a command's help and its errors should not wait for that.
    if name in __all__:
        from skyreels_v2_motioncache import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
