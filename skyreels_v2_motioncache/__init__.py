"""MotionCache for SkyReels-V2, on diffusers' own model and pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.cache import MotionCacheConfig
    from skyreels_v2_motioncache.adapter import MotionCacheHandle, apply_motioncache, remove_motioncache

__all__ = ["MotionCacheConfig", "MotionCacheHandle", "apply_motioncache", "remove_motioncache"]


def __getattr__(name: str) -> Any:
    # The libraries take seconds to import: a command's help, its errors and Ctrl-C should not wait for them.
    if name in __all__:
        module = "common.cache" if name == "MotionCacheConfig" else f"{__name__}.adapter"
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
