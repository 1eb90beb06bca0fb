"""The papers' videos as lists of forwards, so that a decision schedule of any model can be costed at their size."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel

from benchmarks.speed.skyreels import TRANSFORMER_1_3B
from common.cache import Record, Trace
from magi1_motioncache.flops import forward_flops
from magi1_motioncache.plan import Role, SamplingPlan
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.transformer import Magi1Transformer3DModel
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.plan import WindowPlan
from skyreels_v2_motioncache.windows import plan_windows


@dataclass(frozen=True)
class StepShares:
    """Share of a chunk's tokens that each of its steps computes.

    Attributes:
        chunks: per chunk and step, mean over guidance passes, windows and videos. FLOPs are linear in it.
    """

    chunks: list[list[float]]

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> StepShares:
        """What traces of one method record of the chunks that were denoised; every chunk must be, in some window."""
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        for trace in traces:
            for record in trace.records:
                if record.role == "denoise":
                    found[record.chunk, record.step].append(record.tokens / record.tokens_total)
        mean = {key: sum(values) / len(values) for key, values in found.items()}
        chunks, steps = (1 + max(key[i] for key in mean) for i in (0, 1))
        return cls([[mean[chunk, step] for step in range(steps)] for chunk in range(chunks)])

    def at(self, chunk: int, step: int, num_steps: int) -> float:
        """The share of a step among `num_steps`; steps are matched by position, chunks beyond the last are like it."""
        shares = self.chunks[min(chunk, len(self.chunks) - 1)]
        return shares[step * len(shares) // num_steps]


@dataclass(frozen=True)
class PaperScale:
    """A video as a paper made it.

    Attributes:
        vanilla: FLOPs of the paper's vanilla model.
        records: every forward of exact execution over one chunk.
        num_steps: denoising steps of a chunk.
        flops: FLOPs of records, as the paper counts them.
    """

    vanilla: float
    records: list[Record]
    num_steps: int
    flops: Callable[[list[Record]], float]

    @property
    def exact(self) -> float:
        """FLOPs with every token of every active chunk computed."""
        return self.flops(self.records)

    @property
    def floor(self) -> float:
        """FLOPs that no decision saves: embeddings, heads, and K/V of clean chunks."""
        return self._with(lambda record: 0.0)

    def replayed(self, shares: StepShares) -> float:
        """FLOPs of the video when its steps compute these shares of their tokens."""
        return self._with(lambda record: shares.at(record.chunk, record.step, self.num_steps))

    def implied_share(self, flops: float) -> float:
        """Mean share of the denoising that a total says was computed; above 1 if exact execution takes less."""
        return (flops - self.floor) / (self.exact - self.floor)

    def _with(self, share: Callable[[Record], float]) -> float:
        return self.flops(
            [
                dataclasses.replace(record, tokens=record.tokens_total * share(record))
                if record.role == "denoise"
                else record
                for record in self.records
            ]
        )


def skyreels_scale() -> PaperScale:
    """SkyReels-V2 1.3B, 544×960, 177 frames in two windows, 50 steps.

    The vanilla model runs all chunks of a window at each iteration, attention counted on the block-causal area.
    """
    steps, block, tokens = 50, 5, 5 * 34 * 60
    with torch.device("meta"):
        cost = model_cost(SkyReelsV2Transformer3DModel(**TRANSFORMER_1_3B))
    records, iterations, branches = [], 0, ("cond", "uncond")
    for number, window in enumerate(plan_windows("text", 177, 97, 17, block)):
        matrices = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
            None, window.frames, torch.linspace(999, 20, steps).long(), window.frames, 5, window.prefix, block
        )
        plan = WindowPlan.from_matrices(*matrices, steps, window.frames, window.prefix, block)
        iterations += plan.iterations
        clean: set[int] = set()
        for iteration in range(plan.iterations):
            for chunk in plan.work(iteration, clean):
                active = plan.status(iteration, chunk) == "active"
                if not active:
                    clean.add(chunk)
                role, step = ("denoise", plan.step(iteration, chunk)[0]) if active else ("refresh", steps)
                where = (step, role, "full", tokens, tokens, (chunk + 1) * tokens)
                records += [Record(number, iteration, chunk, branch, *where) for branch in branches]
    vanilla = len(branches) * iterations * cost.window_forward(plan.chunks, tokens)
    return PaperScale(vanilla, records, steps, lambda found: cost.trace_flops(Trace(records=found)))


def magi_scale(num_frames: int, kv_ranges: tuple[int, ...]) -> PaperScale:
    """MAGI-1 4.5B distilled, 720×720, 64 steps.

    Counted as lands on the papers' vanilla figures: layers and self-attention, without the pass over finished chunks.

    Args:
        num_frames: of the video.
        kv_ranges: chunks attended to from noise to clean (`noise2clean_kvrange`); empty for all before.
    """
    variant = VARIANTS["4.5B_distill"]
    with torch.device("meta"):
        config = dict(Magi1Transformer3DModel(**variant.transformer).config)
    plan = SamplingPlan.for_frames(variant.sampling.replace(noise2clean_kvrange=kv_ranges), num_frames)
    tokens = plan.config.chunk_width * (variant.height // 16) * (variant.width // 16)
    records = [
        Record(0, call.iteration, call.chunk, role.value, call.step, "denoise", "full", *(tokens, tokens), kv)
        for calls in plan.iterations()
        for call in calls
        for role, kv in [(call.role, call.kv_chunks * tokens)]
        if role is not Role.CLEAN
    ]

    def flops(found: list[Record]) -> float:
        return sum(forward_flops(config, r.tokens, r.kv_tokens, 0, True).blocks for r in found)

    return PaperScale(flops(records), records, plan.config.num_steps, flops)
