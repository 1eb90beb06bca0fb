"""What the benchmark asks of a model: sessions of denoising, and the FLOPs of a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin

from benchmarks.speed.instruments import Part
from benchmarks.speed.replay import ReplayPolicy, Schedule
from common.cache import Engine, MotionCacheConfig, Record

WHOLE = slice(None)
WARMUP_STEPS = 5


@dataclass(frozen=True)
class Mode:
    """One way of denoising: a row of the table.

    Attributes:
        name: of the row.
        config: what to cache; None is the library's own forward, untouched.
        share: tokens computed per step after warm-up, of all; for planning a video's FLOPs.
        schedule: decisions to follow instead of the config's.
    """

    name: str
    config: MotionCacheConfig | None
    share: float = 1.0
    schedule: Schedule | None = None

    def prepare(self, engine: Engine) -> None:
        """Put the schedule, if there is one, in charge."""
        if self.schedule is not None:
            engine.policy = ReplayPolicy(self.config, self.schedule)


@dataclass(frozen=True)
class Session:
    """One denoising, ready to go.

    Attributes:
        denoise: runs it; calls its argument after each iteration and returns the latents that it ends with.
        model: owner and name of the function that is called for every forward of the model.
        parts: what can be timed apart inside it.
        compiled_parts: the same when the blocks are compiled and nothing inside them can be.
        records: of the engine; None for the library's own forward.
    """

    denoise: Callable[[Callable[[], None]], torch.Tensor]
    model: tuple[Any, str]
    parts: list[Part]
    compiled_parts: list[Part]
    records: list[Record] | None


class Subject(Protocol):
    """A model with random weights on a device, and one video to denoise.

    Attributes:
        name: of the model, as in the table.
        transformer: its network.
        cached: config of its cached rows, without a budget.
        has_stock: whether a library has a forward of its own for it.
        paper: PFLOPs of the published fast or slow setting, and of vanilla.
        video_iterations: of the whole video.
        attention_shape: queries, keys, heads and head size of a whole chunk's self-attention at its longest.
    """

    name: str
    transformer: ModelMixin
    cached: MotionCacheConfig
    has_stock: bool
    paper: tuple[float, float]
    video_iterations: int

    def to(self, device: torch.device) -> None:
        """Move weights and prompt to another device."""

    def steady(self, count: int) -> slice:
        """Iterations in which all chunks of the window are being denoised, `count` of them.

        Raises:
            UserError: there are not so many in a row.
        """

    def session(self, mode: Mode, iterations: slice) -> AbstractContextManager[Session]:
        """A denoising of some iterations of the video, or of all."""

    def flops(self, records: Sequence[Record]) -> float:
        """Of the forwards that were recorded or planned."""

    def stock_flops(self) -> float:
        """Of one iteration of the vanilla model over the whole video's length on average."""

    def plan(self) -> list[Record]:
        """The exact forwards of the whole video."""

    @property
    def attention_shape(self) -> tuple[int, int, int, int]: ...


def engine_parts(engine: Engine) -> list[Part]:
    """Labels of the engine's own work."""
    policy = [(engine.policy, name, "policy") for name in ("announce", "decide", "observe", "observe_refresh")]
    return [*policy, (engine, "run_blocks", "gather, scatter, reuse"), (engine, "finish", "gather, scatter, reuse")]


def compiled_parts(blocks: Sequence[torch.nn.Module]) -> list[Part]:
    """Labels of blocks that `compile` was called on."""
    return [(block, "_compiled_call_impl", "blocks, compiled") for block in blocks]


def with_share(plan: Sequence[Record], share: float) -> list[Record]:
    """The plan with `share` of the tokens wherever a cached run selects: after warm-up and a branch's first step."""
    seen: set[tuple[int, str]] = set()
    records = []
    for record in plan:
        key = (record.chunk, record.branch)
        if share < 1 and record.role == "denoise" and record.step >= WARMUP_STEPS and key in seen:
            tokens = max(1, round(share * record.tokens_total))
            record = Record(**{**vars(record), "decision": "select", "tokens": tokens})
        seen.add(key)
        records.append(record)
    return records


def paper_share(subject: Subject) -> float:
    """Share of tokens at which the video takes the paper's part of the vanilla FLOPs, warm-up included.

    Raises:
        ValueError: warm-up alone takes more.
    """
    cached, vanilla = subject.paper
    plan = subject.plan()
    target = cached / vanilla * subject.stock_flops() * subject.video_iterations
    # FLOPs are linear in the share, up to the rounding of token counts.
    low, high = subject.flops(with_share(plan, 0.01)), subject.flops(with_share(plan, 0.99))
    share = 0.01 + 0.98 * (target - low) / (high - low)
    if not 0 < share < 1:
        raise ValueError(f"{subject.name}: no share of tokens gives {target:.3g} FLOPs")
    return share
