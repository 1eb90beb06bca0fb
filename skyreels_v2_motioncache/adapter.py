"""Attaches the caching engine to diffusers' SkyReels-V2 diffusion-forcing pipelines, and detaches it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from diffusers.hooks.hooks import HookRegistry
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from torch import Tensor

from common.cache import MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.errors import UserError
from skyreels_v2_motioncache import attention
from skyreels_v2_motioncache.hook import MotionCacheHook, PrefixNoise
from skyreels_v2_motioncache.plan import WindowPlan
from skyreels_v2_motioncache.polynomial import with_polynomial
from skyreels_v2_motioncache.solver import with_host_coefficients

HOOK = "motioncache"


@dataclass(frozen=True)
class Attachment:
    """What was put where, to be taken out again.

    Attributes:
        pipe: the pipeline.
        schedulers: its own, and the one in its place.
        methods: by name, what stands in for a method, and what the pipeline had there instead of its class's, if
            anything.
        forward: the transformer's, the cache inside.
    """

    pipe: Any
    schedulers: tuple[Any, Any]
    methods: dict[str, tuple[Callable, Callable | None]]
    forward: Callable


@dataclass
class MotionCacheHandle:
    """What `apply_motioncache` returns: the running engine's config and records."""

    hook: MotionCacheHook

    @property
    def config(self) -> MotionCacheConfig:
        return self.hook.engine.config

    @property
    def trace(self) -> Trace:
        """What was computed in the latest call of the pipeline."""
        return self.hook.engine.trace


def apply_motioncache(
    pipe: Any,
    config: MotionCacheConfig,
    prefix_noise: PrefixNoise = "frozen",
    keep_maps: bool = False,
    policy: Policy | None = None,
) -> MotionCacheHandle:
    """Attach the cache to a SkyReels-V2 diffusion-forcing pipeline (text, image or video to video).

    The pipeline is called as before. Its transformer then computes only chunks that are being denoised, reads a clean
    chunk's K/V from the cache after renewing them once at t = 0, and follows `config` for the rest. A UniPC scheduler
    is exchanged for one that does not wait for the GPU. With `MotionCacheConfig.preset("exact")` the result equals the
    stock pipeline's up to rounding.

    Args:
        pipe: `SkyReelsV2DiffusionForcingPipeline`, its `ImageToVideo` or its `VideoToVideo` sibling.
        config: what to cache. Where it measures the time modulation and has no polynomial, TeaCache's for the 1.3B or
            the 14B model is filled in.
        prefix_noise: the stock pipelines add fresh noise to given frames at each iteration (`addnoise_condition`).
            `"fresh"` follows them and recomputes those chunks each time; `"frozen"` computes them once, with the noise
            of the first iteration.
        keep_maps: keep weights and masks of every step in the trace, for pictures.
        policy: decides in place of the one that the config names; see docs/new_model.md.

    Returns:
        A handle with the `trace` of the latest call.

    Raises:
        UserError: the pipeline is of another kind, or its transformer has a cache already; the config needs a
            polynomial that is not known for this model, or has settings that SkyReels-V2 cannot follow.

    Example:
        >>> handle = apply_motioncache(pipe, MotionCacheConfig.preset("slow"))
        >>> video = pipe("a cat on a sofa", num_frames=97, ar_step=5, causal_block_size=5).frames[0]
        >>> handle.trace.totals()
        >>> remove_motioncache(pipe)
    """
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, SkyReelsV2Transformer3DModel) or not hasattr(pipe, "generate_timestep_matrix"):
        raise UserError(
            f"{type(pipe).__name__} is not a SkyReels-V2 diffusion-forcing pipeline; "
            "load SkyReelsV2DiffusionForcingPipeline or its image-to-video or video-to-video sibling"
        )
    if prefix_noise not in ("frozen", "fresh"):
        raise UserError(f"prefix_noise: {prefix_noise!r} is not allowed; choose 'frozen' or 'fresh'")
    if config.kv_budget is not None and prefix_noise == "fresh":
        raise UserError("prefix_noise: 'fresh' renews K/V that kv_budget compresses; use 'frozen', or no kv_budget")
    if config.reuse == "update":
        raise UserError(
            "reuse: 'update' is not allowed, SkyReels-V2's solver takes several outputs for a step; use 'residual' or "
            "'velocity'"
        )
    if _hook_of(transformer) is not None:
        raise UserError(
            "this pipeline has a cache already, or one that shares its transformer; call remove_motioncache(pipe) first"
        )
    hook = MotionCacheHook(with_polynomial(config, transformer), prefix_noise, keep_maps, policy)
    schedulers = pipe.scheduler, with_host_coefficients(pipe.scheduler)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    pipe.scheduler = schedulers[1]
    offloaded, outermost = hasattr(transformer, "_hf_hook"), transformer.forward
    if offloaded:
        # Under accelerate's offloading, which the stock pipelines take off and put on again at the end of each call:
        # around it, the cache would be taken off as well.
        transformer.forward = transformer._old_forward
    for name in ("lazy_prefetch_group_offloading", "layer_execution_tracker"):
        # diffusers' search for the order of offloaded layers ends with taking itself out, and all hooks around it.
        registry.remove_hook(name)
    registry.register_hook(hook, HOOK)
    installed = transformer.forward
    if offloaded:
        transformer._old_forward, transformer.forward = installed, outermost
    attention.install(transformer)
    methods = {name: (ours, vars(pipe).get(name)) for name, ours in _listeners(pipe, hook).items()}
    vars(pipe).update({name: ours for name, (ours, _) in methods.items()})
    hook.attachment = Attachment(pipe, schedulers, methods, installed)
    return MotionCacheHandle(hook)


def remove_motioncache(pipe: Any) -> None:
    """Detach the cache; the pipeline and its transformer are as they were before `apply_motioncache`.

    What was exchanged meanwhile (scheduler, attention processors, methods of the pipeline) stays.

    Args:
        pipe: the pipeline, or one that shares its transformer: the cache is taken off the one that it was applied to.

    Raises:
        UserError: the pipeline has no cache.
    """
    transformer = getattr(pipe, "transformer", None)
    hook = _hook_of(transformer)
    if hook is None:
        raise UserError("this pipeline has no cache to remove")
    attached, registry, outermost = hook.attachment, transformer._diffusers_hook, transformer.forward
    attention.uninstall(transformer)
    stock, ours = attached.schedulers
    for sharing in (attached.pipe, pipe):
        if sharing.scheduler is ours:
            sharing.scheduler = stock
    registry.remove_hook(HOOK, recurse=False)
    if getattr(transformer, "_old_forward", None) is attached.forward:
        # accelerate's offloading was put around the cache: it stays, around the stock forward.
        transformer._old_forward, transformer.forward = transformer.forward, outermost
    if not registry.hooks:
        del transformer._diffusers_hook
    if transformer.__dict__.get("forward") == MethodType(type(transformer).forward, transformer):
        del transformer.forward
    held = vars(attached.pipe)
    for name, (ours, own) in attached.methods.items():
        if held.get(name) is ours:
            del held[name]
            if own is not None:
                held[name] = own


def _hook_of(transformer: Any) -> MotionCacheHook | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK)


def _listeners(pipe: Any, hook: MotionCacheHook) -> dict[str, Callable]:
    """What hears of new videos and windows, around two methods that every stock DF pipeline calls for each of them."""
    check_inputs, make_matrix = pipe.check_inputs, pipe.generate_timestep_matrix

    def on_video(*args: Any, **kwargs: Any) -> None:
        hook.start_video()
        check_inputs(*args, **kwargs)

    def on_window(
        num_latent_frames: int,
        step_template: Tensor,
        base_num_latent_frames: int,
        ar_step: int = 5,
        num_pre_ready: int = 0,
        causal_block_size: int = 1,
        **kwargs: Any,
    ) -> tuple:
        result = make_matrix(
            num_latent_frames,
            step_template,
            base_num_latent_frames,
            ar_step,
            num_pre_ready,
            causal_block_size,
            **kwargs,
        )
        block = pipe.transformer.config.num_frame_per_block
        hook.start_window(
            WindowPlan.from_matrices(*result, len(step_template), num_latent_frames, num_pre_ready, block)
        )
        return result

    return {"check_inputs": on_video, "generate_timestep_matrix": on_window}
