"""MAGI-1 4.5B (distilled) at 720×720 with random weights, driven through its sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.speed.instruments import Part
from benchmarks.speed.subject import WHOLE, Mode, Session, compiled_parts, engine_parts
from common.cache import MotionCacheConfig, Record, Trace
from common.errors import UserError
from common.precision import to_mixed_precision
from magi1_motioncache import attention
from magi1_motioncache.adapter import CachedDenoiser
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.flops import trace_flops
from magi1_motioncache.kv_cache import LayerView
from magi1_motioncache.plan import ChunkCall, Role, SamplingPlan
from magi1_motioncache.presets import TRANSFORMER_4_5B, VARIANTS
from magi1_motioncache.sampler import Magi1Sampler
from magi1_motioncache.transformer import PATCH, Magi1Transformer3DModel

SPATIAL_FACTOR = 8  # frame pixels per latent pixel
TRANSFORMER_TINY = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 128,
    "caption_channels": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "name": "magi-1-4.5b",
        "transformer": TRANSFORMER_4_5B,
        "frames": 168,
        "side": 720,
        "text_tokens": 102,
        "steps": 64,
    },
    "tiny": {
        "name": "magi-1-random",
        "transformer": TRANSFORMER_TINY,
        "frames": 168,
        "side": 64,
        "text_tokens": 12,
        "steps": 32,
    },
}


@dataclass(frozen=True)
class PartialPlan(SamplingPlan):
    """A plan that begins and ends where it is told: `part` of its iterations."""

    part: slice = field(default_factory=lambda: WHOLE)

    def iterations(self) -> Iterator[tuple[ChunkCall, ...]]:
        return iter(list(super().iterations())[self.part])


class Magi:
    """One video of MAGI-1 (see `Subject`): seven chunks of 6 latent frames, four at a time, one guidance pass.

    Args:
        size: `"full"` or `"tiny"`.
        device: where weights are made and run.
        dtype: what weights are cast to, but for those that a checkpoint keeps in float32.
    """

    has_stock = False
    paper = (64.0, 139.0)
    cached = MotionCacheConfig(
        distance="input",
        polynomial=None,
        warmup_steps=1,
        chunk_phase=0,
        score="latent_motion",
        reuse="velocity",
    )

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        sizes = SIZES[size]
        self.name = sizes["name"]
        self._sampling = VARIANTS["4.5B_distill"].sampling.replace(num_steps=sizes["steps"])
        self._frames, self._text_tokens = sizes["frames"], sizes["text_tokens"]
        self._latent_side = sizes["side"] // SPATIAL_FACTOR
        self._device = device
        torch.manual_seed(0)
        with device:
            model = to_mixed_precision(Magi1Transformer3DModel(**sizes["transformer"]), dtype)
            self.transformer = model.eval().requires_grad_(False)
            self._caption = torch.randn(self._text_tokens, self.transformer.config.caption_channels)
        self.video_iterations = self._video().total_iterations

    def to(self, device: torch.device) -> None:
        self.transformer.to(device)
        self._caption, self._device = self._caption.to(device), device

    def steady(self, count: int) -> slice:
        # A stage begins with the clean pass that its later iterations read; the first whole window is the fourth stage.
        stage = self._sampling.steps_per_stage
        if count > stage:
            raise UserError(f"{count} iterations are asked for, a stage has {stage}; lower --iterations")
        first = self._sampling.window_size * stage
        return slice(first, first + count)

    @contextmanager
    def session(self, mode: Mode, iterations: slice) -> Iterator[Session]:
        plan = self._video(iterations)
        null = self.transformer.y_embedder.null_caption_embedding
        captions = ChunkCaptions.build(
            self._caption, torch.ones(self._text_tokens, device=self._device), null, plan.num_chunks
        )
        denoiser = CachedDenoiser(self.transformer, captions, plan, mode.config)
        mode.prepare(denoiser.engine)
        shape = (1, self.transformer.latent_channels, plan.latent_frames, self._latent_side, self._latent_side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")  # the same on all devices
        sampler = Magi1Sampler(plan, noise.to(self._device))

        def denoise(on_iteration: Callable[[], None]) -> torch.Tensor:
            for _ in sampler.run(denoiser, on_iteration):
                pass
            return sampler.latents

        model, network = (denoiser, "predict"), self.transformer
        outer = [(denoiser, "prepare", "embedding"), (network, "head", "head"), (network, "unpatchify", "head")]
        outer += [*engine_parts(denoiser.engine), (*model, "rest of the model")]
        inner = [(attention, "attend", "attention kernels"), (LayerView, "update", "K/V write")]
        layers = network.videodit_blocks.layers
        parts = [*outer, *self._layer_parts(), *inner]
        yield Session(denoise, model, parts, [*outer, *compiled_parts(layers)], denoiser.trace.records)

    def flops(self, records: Sequence[Record]) -> float:
        trace = Trace(records=list(records))
        return trace_flops(self.transformer.config, trace, self._text_tokens, self._sampling.distill)

    def stock_flops(self) -> float:
        """Of the exact forwards: no library has this model."""
        return self.flops(self.plan()) / self.video_iterations

    def plan(self) -> list[Record]:
        tokens = self._chunk_tokens
        return [
            Record(
                window=0,
                iteration=call.iteration,
                chunk=call.chunk,
                branch=Role.NEAR.value if call.role is Role.NEAR else call.branch.value,
                step=call.step,
                role="refresh" if call.role is Role.CLEAN else "denoise",
                decision="full",
                tokens=tokens,
                tokens_total=tokens,
                kv_tokens=call.kv_chunks * tokens,
            )
            for calls in self._video().iterations()
            for call in calls
        ]

    @property
    def attention_shape(self) -> tuple[int, int, int, int]:
        """Queries (those of a group folded into one key head), keys, key heads and head size of the widest range."""
        config, tokens = self.transformer.config, self._chunk_tokens
        group = config.num_attention_heads // config.num_query_groups
        widest = max(self._sampling.noise2clean_kvrange)
        return tokens * group, tokens * widest, config.num_query_groups, config.kv_channels

    @property
    def _chunk_tokens(self) -> int:
        return self._sampling.chunk_width * (self._latent_side // PATCH) ** 2

    def _video(self, part: slice = WHOLE) -> PartialPlan:
        chunks = SamplingPlan.for_frames(self._sampling, self._frames).num_chunks
        return PartialPlan(self._sampling, chunks, part=part)

    def _layer_parts(self) -> list[Part]:
        parts: list[Part] = []
        for layer in self.transformer.videodit_blocks.layers:
            parts += [
                (layer, "forward", "norms, modulation, gates"),
                (layer.self_attention, "forward", "self-attention"),
                (layer.self_attention, "_attend_to_caption", "cross-attention"),
                (layer.mlp, "forward", "feed-forward"),
            ]
        return parts
