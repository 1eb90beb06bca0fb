"""The transformer's forward over a window, taken apart into forwards over the chunks that have work to do."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from torch import Tensor

from common.cache import ChunkStep, Compression, Engine, KVCache, MotionCacheConfig, Signals, Staging, Trace, Write
from common.cache.policy import Policy
from common.patches import from_tokens, to_tokens
from skyreels_v2_motioncache import attention
from skyreels_v2_motioncache.plan import WindowPlan
from skyreels_v2_motioncache.routing import Route, Stack, chunk_routing

if TYPE_CHECKING:
    from skyreels_v2_motioncache.adapter import Attachment

logger = logging.getLogger(__name__)

PrefixNoise = Literal["frozen", "fresh"]


@dataclass
class BranchState(BaseState):
    """What one guidance branch of the current window holds."""

    iteration: int = 0
    kv: KVCache | None = None
    clean: set[int] = field(default_factory=set)  # chunks whose K/V are final
    embeddings: Tensor | None = None  # the ones that `prompts` belong to
    prompts: list[attention.Prompt] = field(default_factory=list)  # one per layer, from the first use on

    def reset(self) -> None:
        self.__init__()

    def start_window(self) -> None:
        """A new window: everything but the prompt is forgotten."""
        self.iteration, self.kv, self.clean = 0, None, set()


class MotionCacheHook(ModelHook):
    """Replaces the transformer's forward over a window by the stock forward over each chunk that has work to do."""

    _is_stateful = True

    def __init__(
        self, config: MotionCacheConfig, prefix_noise: PrefixNoise, keep_maps: bool, policy: Policy | None
    ) -> None:
        super().__init__()
        self.engine = Engine(config, policy=policy)
        self.prefix_noise = prefix_noise
        self.keep_maps = keep_maps
        self.branches = StateManager(BranchState)
        self.plan: WindowPlan | None = None
        self.route = Route()
        self.attachment: Attachment | None = None
        self._window = -1
        self._staging: Staging | None = None

    # -- what the pipeline announces ------------------------------------------------------------------------------

    def start_video(self) -> None:
        """A new call of the pipeline: a new trace and no memory of the last video."""
        self.forget()
        self.engine.trace = Trace(keep_maps=self.keep_maps)

    def forget(self) -> None:
        """Free everything but the trace."""
        self.branches.reset()
        self.engine.start_window()
        self.plan, self.route, self._window, self._staging = None, Route(), -1, None

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
        self.plan.check(branch.iteration, timestep)
        if branch.embeddings is not encoder_hidden_states:
            branch.embeddings, branch.prompts = encoder_hidden_states, []
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_image": encoder_hidden_states_image,
            "fps": fps,
            "attention_kwargs": attention_kwargs,
        }
        if branch.kv is None:
            attention.check_installed(module)
            branch.kv = self._new_cache(module, hidden_states)
        self.route.text = branch.prompts[0].text if branch.prompts else None
        self.route.fps = fps
        with chunk_routing(module, self.route):
            output = self._run_window(module, name, branch, hidden_states, timestep, conditions)
        branch.iteration += 1
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run_window(
        self,
        module: SkyReelsV2Transformer3DModel,
        name: str,
        branch: BranchState,
        hidden_states: Tensor,
        timestep: Tensor,
        conditions: dict[str, Any],
    ) -> Tensor:
        """The chunks of a window that have work to do; `[batch, out channels, frames, height, width]`."""
        output = torch.zeros_like(hidden_states[:, : module.config.out_channels])
        iteration = branch.iteration
        work = self.plan.work(iteration, branch.clean)
        if self.engine.decides_jointly:
            self._announce(module, name, iteration, work, hidden_states, timestep, conditions)
        for chunk in work:
            frames = self.plan.frame_range(chunk)
            with self.engine.trace.timed(hidden_states.device):
                chunk_output = self._run_chunk(
                    module, name, branch, chunk, hidden_states[:, :, frames], timestep[:, frames], conditions
                )
            if self.plan.status(iteration, chunk) == "active":
                output[:, :, frames] = chunk_output
            elif self._becomes_final(iteration, chunk):
                branch.clean.add(chunk)
                branch.kv.freeze(chunk * self._grid(module, hidden_states)[1])
                self.engine.release(chunk, name)
        return output

    def _becomes_final(self, iteration: int, chunk: int) -> bool:
        """Whether the K/V that a chunk gets at an iteration are those that stay."""
        renewed = self.prefix_noise == "fresh" and self.plan.is_prefix(chunk)
        return self.plan.status(iteration, chunk) == "finished" and not renewed

    def _grid(self, module: SkyReelsV2Transformer3DModel, hidden_states: Tensor) -> tuple[tuple[int, int, int], int]:
        """Frames, rows and columns of a chunk's tokens, and their number."""
        _, rows, columns = module.config.patch_size
        grid = (self.plan.block, hidden_states.shape[3] // rows, hidden_states.shape[4] // columns)
        return grid, grid[0] * grid[1] * grid[2]

    def _new_cache(self, module: SkyReelsV2Transformer3DModel, hidden_states: Tensor) -> KVCache:
        grid, tokens = self._grid(module, hidden_states)
        compression = Compression.of(self.engine.config, grid)
        if self._staging is None:  # the branches take turns
            self._staging = self.engine.new_staging(hidden_states.device)
        config, rows = module.config, self.plan.chunks * tokens
        size = len(module.blocks), config.num_attention_heads, config.attention_head_dim
        cache = KVCache(*size, rows, compression, self._staging, self.engine.packs_kv)
        self.engine.watch(cache)
        return cache

    def _announce(
        self,
        module: SkyReelsV2Transformer3DModel,
        name: str,
        iteration: int,
        work: list[int],
        hidden_states: Tensor,
        timestep: Tensor,
        conditions: dict[str, Any],
    ) -> None:
        """Tell the engine of all chunks of an iteration that are being denoised."""
        grid, _ = self._grid(module, hidden_states)
        announced = []
        for chunk in work:
            if self.plan.status(iteration, chunk) != "active":
                continue
            frames, signals = self.plan.frame_range(chunk), None
            if self.engine.announces_signals:
                signals = self._signals(iteration, chunk, hidden_states[:, :, frames], timestep[:, frames], conditions)
            announced.append((self._step(name, iteration, chunk, grid, kv_tokens=0), signals))
        if announced:
            self.engine.announce(announced, name)

    def _signals(
        self, iteration: int, chunk: int, latents: Tensor, timestep: Tensor, conditions: dict[str, Any]
    ) -> Signals:
        """What can be measured of a chunk before its blocks run: the stock forward without them."""
        heard = []

        def listen(x: Tensor, text: Tensor, modulation: Tensor, table: Tensor, mask: None) -> Tensor:
            heard.append(Signals(x, modulation))
            return x

        self._forward(listen, iteration, chunk, latents, timestep, conditions)
        return heard[0]

    def _step(self, name: str, iteration: int, chunk: int, grid: tuple[int, int, int], kv_tokens: int) -> ChunkStep:
        plan = self.plan
        active = plan.status(iteration, chunk) == "active"
        step, num_steps = plan.step(iteration, chunk) if active else (plan.num_steps, plan.num_steps)
        return ChunkStep(
            window=self._window,
            iteration=iteration,
            chunk=chunk,
            branch=name,
            step=step,
            num_steps=num_steps,
            sigma=plan.sigma(iteration, chunk) if active else 0.0,
            grid=grid,
            kv_tokens=kv_tokens,
        )

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
        """One chunk's latents `[batch, channels, block, height, width]` through the engine; same shape back."""
        iteration = branch.iteration
        grid, tokens = self._grid(module, latents)
        start = chunk * tokens
        step = self._step(name, iteration, chunk, grid, kv_tokens=branch.kv.length(start + tokens))
        role = "denoise" if self.plan.status(iteration, chunk) == "active" else "refresh"

        def stack(x: Tensor, text: Tensor, modulation: Tensor, table: Tensor, mask: None) -> Tensor:
            # Behind the patch embedding a token's channels are a chunk apart, and blocks keep the layout they are
            # given: every norm and projection would begin with a copy.
            x = x.contiguous()

            def blocks(selected: Tensor, index: Tensor | None) -> Tensor:
                m, r = modulation, table
                if index is not None:
                    r = table.index_select(1, index)
                    m = modulation[:, :, index] if modulation.dim() == 4 else modulation
                write = Write(start, tokens, index)
                compress = branch.kv.compression is not None and self._becomes_final(iteration, chunk)
                if not branch.prompts:
                    branch.prompts = [attention.Prompt(text) for _ in self.route.blocks]
                layers = zip(self.route.blocks, branch.prompts, branch.kv.open(write, selected), strict=True)
                for block, prompt, kv in layers:
                    selected = block(selected, prompt, m, attention.Place(r, kv, write, compress), None)
                return selected

            patches = to_tokens(latents, module.config.patch_size) if self.engine.needs_latents else None
            return self.engine.run_blocks(step, Signals(x, modulation, patches), blocks, role)

        output = self._forward(stack, iteration, chunk, latents, timestep, conditions)
        if not self.engine.reuses_outputs:
            self.engine.finish(output)
            return output
        patch = module.config.patch_size
        return from_tokens(self.engine.finish(to_tokens(output, patch)), grid, patch)

    def _forward(
        self,
        stack: Stack,
        iteration: int,
        chunk: int,
        latents: Tensor,
        timestep: Tensor,
        conditions: dict[str, Any],
    ) -> Tensor:
        """The stock forward on one chunk's latents, with `stack` in place of the blocks."""
        # Frames of a chunk nearly always share one noise level; the modulation is then one row for all its tokens.
        shared = not self.plan.is_mixed(chunk) or bool((timestep == timestep[:, :1]).all())
        self.route.stack, self.route.first_frame = stack, self.plan.frame_range(chunk).start
        self.route.level = self.plan.shared_timestep(iteration, chunk)
        return self.fn_ref.original_forward(
            latents,
            timestep[:, 0] if shared else timestep,
            enable_diffusion_forcing=not shared,
            return_dict=False,
            **conditions,
        )[0]
