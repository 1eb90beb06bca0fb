"""SkyReels-V2 1.3B at 544×960 with random weights, driven through diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from benchmarks.speed.instruments import Part
from benchmarks.speed.subject import WHOLE, Mode, Session, compiled_parts, engine_parts
from common.cache import MotionCacheConfig, Record
from common.cache.kv import LayerKV
from common.errors import UserError
from common.precision import to_mixed_precision
from skyreels_v2_motioncache import apply_motioncache, attention, remove_motioncache
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.plan import WindowPlan

TRANSFORMER_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "inject_sample_info": True,
    "num_frame_per_block": 5,
}
TRANSFORMER_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
    "inject_sample_info": True,
    "num_frame_per_block": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "name": "skyreels-v2-1.3b",
        "transformer": TRANSFORMER_1_3B,
        "text_tokens": 512,
        "call": {"height": 544, "width": 960, "num_frames": 97, "num_inference_steps": 50, "ar_step": 5},
    },
    "tiny": {
        "name": "skyreels-v2-random",
        "transformer": TRANSFORMER_TINY,
        "text_tokens": 8,
        "call": {"height": 64, "width": 96, "num_frames": 21, "num_inference_steps": 40, "ar_step": 2},
    },
}


class PartialPipeline(SkyReelsV2DiffusionForcingPipeline):
    """The stock pipeline, which begins and ends where it is told: `iterations` of the schedule it would run."""

    iterations = WHOLE

    def generate_timestep_matrix(self, *args: Any, **kwargs: Any) -> tuple:
        return tuple(rows[self.iterations] for rows in super().generate_timestep_matrix(*args, **kwargs))


class SkyReels:
    """One window of SkyReels-V2 (see `Subject`): 25 latent frames in chunks of 5, with guidance.

    Args:
        size: `"full"` or `"tiny"`.
        device: where weights are made and run.
        dtype: what weights are cast to, but for those that a checkpoint keeps in float32.
    """

    has_stock = True
    paper = (30.0, 113.0)
    branches = ("cond", "uncond")
    cached = MotionCacheConfig(distance="input", polynomial=None, warmup_steps=1, chunk_phase=0)

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        sizes = SIZES[size]
        self.name = sizes["name"]
        torch.manual_seed(0)
        with device:
            model = to_mixed_precision(SkyReelsV2Transformer3DModel(**sizes["transformer"]), dtype)
            self.transformer = model.eval().requires_grad_(False)
            text = (1, sizes["text_tokens"], self.transformer.config.text_dim)
            self._prompts = [torch.randn(text, dtype=dtype) for _ in self.branches]
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
        self._pipe = PartialPipeline(None, None, self.transformer, None, scheduler)
        self._pipe.set_progress_bar_config(disable=True)
        self._call = {**sizes["call"], "causal_block_size": self.transformer.config.num_frame_per_block}
        self._cost = model_cost(self.transformer, sizes["text_tokens"])
        self._plan = self._window_plan()
        self.video_iterations = self._plan.iterations

    def to(self, device: torch.device) -> None:
        self.transformer.to(device)
        self._prompts = [prompt.to(device) for prompt in self._prompts]

    def steady(self, count: int) -> slice:
        first = self._call["ar_step"] * (self._plan.chunks - 1)
        available = self._call["num_inference_steps"] - 1 - first
        if count > available:
            raise UserError(f"{count} iterations are asked for, {available} have all chunks active; lower --iterations")
        return slice(first, first + count)

    @contextmanager
    def session(self, mode: Mode, iterations: slice) -> Iterator[Session]:
        pipe = self._pipe
        pipe.iterations = iterations

        def denoise(on_iteration: Callable[[], None]) -> torch.Tensor:
            def after(pipe: Any, i: int, t: torch.Tensor, tensors: dict) -> dict:
                on_iteration()
                return tensors

            return pipe(
                **self._call,
                prompt=None,
                prompt_embeds=self._prompts[0],
                negative_prompt_embeds=self._prompts[1],
                guidance_scale=6.0,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                callback_on_step_end=after,
            ).frames

        model = (self.transformer, "forward")
        ends = [*self._outer_parts(), (*model, "rest of the model")]
        blocks = compiled_parts(self.transformer.blocks)
        if mode.config is None:
            yield Session(denoise, model, [*ends, *self._block_parts()], [*ends, *blocks], None)
            return
        hook = apply_motioncache(pipe, mode.config).hook
        mode.prepare(hook.engine)
        engine = engine_parts(hook.engine)
        inner = [(attention, "attend", "attention kernels"), (LayerKV, "update", "K/V write")]
        records: list[Record] = []

        def recorded(on_iteration: Callable[[], None]) -> torch.Tensor:
            latents = denoise(on_iteration)
            records.extend(hook.engine.trace.records)
            return latents

        try:
            yield Session(
                recorded, model, [*ends, *engine, *self._block_parts(), *inner], [*ends, *engine, *blocks], records
            )
        finally:
            remove_motioncache(pipe)

    def flops(self, records: Sequence[Record]) -> float:
        return sum(map(self._cost.record_flops, records))

    def stock_flops(self) -> float:
        """Block-causal area, as the papers count; the library computes the whole square."""
        return len(self.branches) * self._cost.window_forward(self._plan.chunks, self._chunk_tokens)

    def plan(self) -> list[Record]:
        plan, tokens = self._plan, self._chunk_tokens
        records = []
        for branch in self.branches:
            clean: set[int] = set()
            for i in range(plan.iterations):
                for chunk in plan.work(i, clean):
                    active = plan.status(i, chunk) == "active"
                    clean |= set() if active else {chunk}
                    role, step = ("denoise", plan.step(i, chunk)[0]) if active else ("refresh", plan.num_steps)
                    kv = (chunk + 1) * tokens
                    records.append(Record(0, i, chunk, branch, step, role, "full", tokens, tokens, kv))
        return records

    @property
    def attention_shape(self) -> tuple[int, int, int, int]:
        """Queries, keys, heads and head size of the last chunk's self-attention."""
        config, tokens = self.transformer.config, self._chunk_tokens
        return tokens, tokens * self._plan.chunks, config.num_attention_heads, config.attention_head_dim

    @property
    def _chunk_tokens(self) -> int:
        _, rows, columns = self.transformer.config.patch_size
        factor = self._pipe.vae_scale_factor_spatial
        sides = (self._call["height"] // factor // rows, self._call["width"] // factor // columns)
        return self._plan.block * sides[0] * sides[1]

    def _window_plan(self) -> WindowPlan:
        call, steps = self._call, self._call["num_inference_steps"]
        frames = (call["num_frames"] - 1) // self._pipe.vae_scale_factor_temporal + 1
        self._pipe.scheduler.set_timesteps(steps)
        block = call["causal_block_size"]
        matrices = self._pipe.generate_timestep_matrix(
            frames, self._pipe.scheduler.timesteps, frames, call["ar_step"], 0, block
        )
        return WindowPlan.from_matrices(*matrices, steps, frames, 0, block)

    def _outer_parts(self) -> list[Part]:
        model = self.transformer
        embeddings = (model.patch_embedding, model.condition_embedder, model.rope)
        heads = (model.norm_out, model.proj_out)
        return [(m, "forward", "embedding") for m in embeddings] + [(m, "forward", "head") for m in heads]

    def _block_parts(self) -> list[Part]:
        parts: list[Part] = []
        for block in self.transformer.blocks:
            parts += [
                (block, "forward", "norms, modulation, gates"),
                (block.attn1, "forward", "self-attention"),
                (block.attn2, "forward", "cross-attention"),
                (block.ffn, "forward", "feed-forward"),
            ]
        return parts
