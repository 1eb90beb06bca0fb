"""Attaches the caching engine to diffusers' SkyReels-V2 diffusion-forcing pipelines, and detaches it again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from torch import Tensor

from common.cache import ChunkStep, Engine, KVCache, MotionCacheConfig, Signals, Trace, Write
from common.errors import UserError
from skyreels_v2_motioncache import attention
from skyreels_v2_motioncache.plan import WindowPlan
from skyreels_v2_motioncache.routing import chunk_routing

logger = logging.getLogger(__name__)

HOOK = "motioncache"
PrefixNoise = Literal["frozen", "fresh"]


@dataclass
class BranchState(BaseState):
    """What one guidance branch of the current window holds."""

    iteration: int = 0
    kv: KVCache | None = None
    clean: set[int] = field(default_factory=set)  # chunks whose K/V are final
    prompt: Tensor | None = None  # the embeddings that `prompt_kv` belongs to
    prompt_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()

    def start_window(self) -> None:
        """A new window: everything but the prompt is forgotten."""
        self.iteration, self.kv, self.clean = 0, None, set()


class MotionCacheHook(ModelHook):
    """Replaces the transformer's forward over a window by the stock forward over each chunk that has work to do."""

    _is_stateful = True

    def __init__(self, config: MotionCacheConfig, prefix_noise: PrefixNoise, keep_maps: bool) -> None:
        super().__init__()
        self.engine = Engine(config)
        self.prefix_noise = prefix_noise
        self.keep_maps = keep_maps
        self.branches = StateManager(BranchState)
        self.call = attention.ChunkCall()
        self.plan: WindowPlan | None = None
        self.installed_forward: Callable | None = None
        self._window = -1

    # -- what the pipeline announces ------------------------------------------------------------------------------

    def start_video(self) -> None:
        """A new call of the pipeline: a new trace and no memory of the last video."""
        self.forget()
        self.engine.trace = Trace(keep_maps=self.keep_maps)

    def forget(self) -> None:
        """Free everything but the trace."""
        self.branches.reset()
        self.engine.start_window()
        self.plan, self._window = None, -1

    def start_window(self, plan: WindowPlan) -> None:
        """A new window of the video, with its schedule."""
        if self.plan is None and plan.chunks == 1:
            logger.warning(
                "attention is not causal or the window holds one chunk: all %d latent frames are cached as one chunk",
                plan.frames,
            )
        self.plan = plan
        self._window += 1
        self.engine.start_window()
        for state in self.branches._state_cache.values():
            state.start_window()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.forget()  # the stock pipelines ask for this at the end of each call, when the trace is still of use
        return module

    # -- the transformer's forward --------------------------------------------------------------------------------

    def new_forward(
        self,
        module: SkyReelsV2Transformer3DModel,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        enable_diffusion_forcing: bool = False,
        fps: Any = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor]:
        """One iteration of one branch: `hidden_states` `[batch, channels, frames, height, width]` is the whole window.

        Frames that the pipeline will not update come back as zeros.
        """
        if self.plan is None:
            raise RuntimeError("the transformer was called outside the pipeline that the cache was applied to")
        name = self.branches.context.name
        branch: BranchState = self.branches.get_state()
        iteration = branch.iteration
        self.plan.check(iteration, timestep)
        if branch.prompt is not encoder_hidden_states:
            branch.prompt, branch.prompt_kv = encoder_hidden_states, {}
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_image": encoder_hidden_states_image,
            "fps": fps,
            "attention_kwargs": attention_kwargs,
        }
        output = torch.zeros_like(hidden_states[:, : module.config.out_channels])
        for chunk in self.plan.work(iteration, branch.clean):
            frames = self.plan.frame_range(chunk)
            with self.engine.trace.timed(hidden_states.device):
                chunk_output = self._run_chunk(
                    module, name, branch, chunk, hidden_states[:, :, frames], timestep[:, frames], conditions
                )
            if self.plan.status(iteration, chunk) == "active":
                output[:, :, frames] = chunk_output
            elif not (self.prefix_noise == "fresh" and self.plan.is_prefix(chunk)):
                branch.clean.add(chunk)
                branch.kv.freeze(chunk * self._grid(module, hidden_states)[1])
                self.engine.release(chunk, name)
        branch.iteration += 1
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _grid(self, module: SkyReelsV2Transformer3DModel, hidden_states: Tensor) -> tuple[tuple[int, int, int], int]:
        """Frames, rows and columns of a chunk's tokens, and their number."""
        _, rows, columns = module.config.patch_size
        grid = (self.plan.block, hidden_states.shape[3] // rows, hidden_states.shape[4] // columns)
        return grid, grid[0] * grid[1] * grid[2]

    def _run_chunk(
        self,
        module: SkyReelsV2Transformer3DModel,
        name: str,
        branch: BranchState,
        chunk: int,
        latents: Tensor,
        timestep: Tensor,
        conditions: dict[str, Any],
    ) -> Tensor:
        """The stock forward on one chunk's latents `[batch, channels, block, height, width]`; same shape back."""
        plan, iteration = self.plan, branch.iteration
        grid, tokens = self._grid(module, latents)
        start = chunk * tokens
        if branch.kv is None:
            branch.kv = KVCache(len(module.blocks), plan.chunks * tokens, self.engine.storage)
        active = plan.status(iteration, chunk) == "active"
        step, num_steps = plan.step(iteration, chunk) if active else (plan.num_steps, plan.num_steps)
        chunk_step = ChunkStep(
            window=self._window,
            iteration=iteration,
            chunk=chunk,
            branch=name,
            step=step,
            num_steps=num_steps,
            sigma=plan.sigma(iteration, chunk) if active else 0.0,
            grid=grid,
            kv_tokens=start + tokens,
        )

        def stack(x: Tensor, text: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], mask: None) -> Tensor:
            def blocks(selected: Tensor, index: Tensor | None) -> Tensor:
                m, r = modulation, rope
                if index is not None:
                    r = tuple(table[:, index] for table in rope)
                    m = modulation[:, :, index] if modulation.dim() == 4 else modulation
                self.call.kv, self.call.prompt_kv = branch.kv, branch.prompt_kv
                self.call.write = Write.of(start, grid, index, self.engine.config.reused_kv)
                try:
                    for block in stock_blocks:
                        selected = block(selected, text, m, r, None)
                finally:
                    self.call.write = None
                return selected

            patches = to_tokens(latents, module.config.patch_size) if self.engine.needs_latents else None
            signals = Signals(x, modulation, patches)
            return self.engine.run_blocks(chunk_step, signals, blocks, "denoise" if active else "refresh")

        stock_blocks = list(module.blocks)
        # Frames of a chunk nearly always share one noise level; the modulation is then one row for all its tokens.
        shared = not plan.is_mixed(chunk) or bool((timestep == timestep[:, :1]).all())
        with chunk_routing(module, stack, plan.frame_range(chunk).start):
            output = self.fn_ref.original_forward(
                latents,
                timestep[:, 0] if shared else timestep,
                enable_diffusion_forcing=not shared,
                return_dict=False,
                **conditions,
            )[0]
        if not self.engine.reuses_outputs:
            self.engine.finish(output)
            return output
        patch = module.config.patch_size
        return from_tokens(self.engine.finish(to_tokens(output, patch)), grid, patch)


def to_tokens(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut `[batch, channels, frames, height, width]` into patches, `[batch, tokens, channels * patch volume]`."""
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_tokens(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_tokens`; `grid` is in tokens."""
    x = x.unflatten(1, grid).unflatten(4, (-1, *patch))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


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
    pipe: Any, config: MotionCacheConfig, prefix_noise: PrefixNoise = "frozen", keep_maps: bool = False
) -> MotionCacheHandle:
    """Attach the cache to a SkyReels-V2 diffusion-forcing pipeline (text, image or video to video).

    The pipeline is called as before. Its transformer then computes only chunks that are being denoised, reads a clean
    chunk's K/V from the cache after renewing them once at t = 0, and follows `config` for the rest. With
    `MotionCacheConfig.preset("exact")` the result equals the stock pipeline's up to rounding.

    Args:
        pipe: `SkyReelsV2DiffusionForcingPipeline`, its `ImageToVideo` or its `VideoToVideo` sibling.
        config: what to cache.
        prefix_noise: the stock pipelines add fresh noise to given frames at each iteration (`addnoise_condition`).
            `"fresh"` follows them and recomputes those chunks each time; `"frozen"` computes them once, with the noise
            of the first iteration.
        keep_maps: keep weights and masks of every step in the trace, for pictures.

    Returns:
        A handle with the `trace` of the latest call.

    Raises:
        UserError: the pipeline is of another kind, or has a cache already.

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
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(HOOK) is not None:
        raise UserError("this pipeline has a cache already; call remove_motioncache(pipe) first")
    hook = MotionCacheHook(config, prefix_noise, keep_maps)
    registry.register_hook(hook, HOOK)
    hook.installed_forward = transformer.forward
    attention.install(transformer, hook.call)
    _listen(pipe, hook)
    return MotionCacheHandle(hook)


def remove_motioncache(pipe: Any) -> None:
    """Detach the cache; the pipeline and its transformer are as they were before `apply_motioncache`.

    Raises:
        UserError: the pipeline has no cache.
    """
    registry = getattr(pipe.transformer, "_diffusers_hook", None)
    if registry is None or registry.get_hook(HOOK) is None:
        raise UserError("this pipeline has no cache to remove")
    transformer = pipe.transformer
    attention.uninstall(transformer)
    hook, outermost = registry.get_hook(HOOK), transformer.forward
    registry.remove_hook(HOOK, recurse=False)
    if getattr(transformer, "_old_forward", None) is hook.installed_forward:
        # accelerate's offloading was put around the cache: it stays, around the stock forward.
        transformer._old_forward, transformer.forward = transformer.forward, outermost
    if not registry.hooks:
        del transformer._diffusers_hook
    if transformer.__dict__.get("forward") == MethodType(type(transformer).forward, transformer):
        del transformer.forward
    for name in ("check_inputs", "generate_timestep_matrix"):
        del pipe.__dict__[name]


def _listen(pipe: Any, hook: MotionCacheHook) -> None:
    """Hear of new videos and windows, from the two methods that every stock DF pipeline calls for each of them."""
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

    pipe.check_inputs, pipe.generate_timestep_matrix = on_video, on_window
