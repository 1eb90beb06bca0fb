"""Attaches the caching engine to a `Magi1Pipeline`, and detaches it again."""

from __future__ import annotations

from common.cache import Engine, MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.errors import UserError
from magi1_motioncache.adapter import CachedDenoiser, check_config
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.plan import SamplingPlan
from magi1_motioncache.transformer import Magi1Transformer3DModel


class MotionCacheHandle:
    """What `apply_motioncache` returns: the engine's config and records. Makes a denoiser for each video.

    Args:
        config: what to cache.
        keep_maps: keep weights and masks of every step in the trace, for pictures.
        policy: decides in place of the one that the config names.
    """

    def __init__(self, config: MotionCacheConfig, keep_maps: bool, policy: Policy | None) -> None:
        self.config, self.policy = config, policy
        self.keep_maps = keep_maps
        self.trace = Trace(keep_maps=keep_maps)
        """What was computed in the latest call of the pipeline."""

    def __call__(
        self, transformer: Magi1Transformer3DModel, captions: ChunkCaptions, plan: SamplingPlan
    ) -> CachedDenoiser:
        """A denoiser for one video, which begins a new trace."""
        denoiser = CachedDenoiser(transformer, captions, plan, self.config, self.keep_maps, self.policy)
        self.trace = denoiser.trace
        return denoiser


def apply_motioncache(
    pipe: Magi1Pipeline, config: MotionCacheConfig, keep_maps: bool = False, policy: Policy | None = None
) -> MotionCacheHandle:
    """Attach the cache to a pipeline, which is called as before.

    With `method="exact"` nothing is reused, and the result equals that of the pipeline alone up to rounding.

    Args:
        pipe: the pipeline.
        config: what to cache; `cache_preset` has the published settings.
        keep_maps: keep weights and masks of every step in the trace, for pictures.
        policy: decides in place of the one that the config names, one video at a time; see docs/new_model.md.

    Returns:
        A handle with the `trace` of the latest call.

    Raises:
        UserError: the pipeline is of another kind or has a cache already, or the config does not suit MAGI-1 or the
            policy.

    Example:
        >>> handle = apply_motioncache(pipe, cache_preset("slow"))
        >>> video = pipe("a cat on a sofa", num_frames=96).frames[0]
        >>> handle.trace.totals()
        >>> remove_motioncache(pipe)
    """
    if not isinstance(pipe, Magi1Pipeline):
        raise UserError(f"{type(pipe).__name__} is not a MAGI-1 pipeline; load Magi1Pipeline")
    if isinstance(pipe.denoiser, MotionCacheHandle):
        raise UserError("this pipeline has a cache already; call remove_motioncache(pipe) first")
    if policy is None:
        check_config(config)
    Engine(config, policy=policy)  # refuses now what the first video's would
    handle = MotionCacheHandle(config, keep_maps, policy)
    pipe.denoiser = handle
    return handle


def remove_motioncache(pipe: Magi1Pipeline) -> None:
    """Detach the cache; the pipeline is as it was before `apply_motioncache`.

    Raises:
        UserError: the pipeline has no cache.
    """
    if not isinstance(getattr(pipe, "denoiser", None), MotionCacheHandle):
        raise UserError("this pipeline has no cache to remove")
    pipe.denoiser = ExactDenoiser
