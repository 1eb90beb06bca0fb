"""Decisions that can be known without running a model.

With a distance measured beforehand and tokens of equal weights (α = 1), the steps alone tell what is computed. The
records of one exact run hold the steps, so the engine can be led through them with empty tokens and no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.cache.config import MotionCacheConfig
from common.cache.engine import Engine
from common.cache.policy import ChunkStep, Signals
from common.cache.trace import Record


def is_foretellable(config: MotionCacheConfig) -> bool:
    """Whether decisions depend on the steps alone, and the keys attended to are those of exact execution."""
    per_chunk = config.method == "motioncache" and not config.token_level
    return per_chunk and config.distance == "table" and config.kv_budget is None


def foretell(exact: Sequence[Record], config: MotionCacheConfig) -> list[Record]:
    """What a run with a config would record.

    Args:
        exact: all records of an exact run with the same schedule.
        config: how the run caches.

    Returns:
        A record for each of `exact`, with its decision and number of tokens; times are 0.

    Raises:
        ValueError: the config's decisions depend on more than the steps.
    """
    if not is_foretellable(config):
        raise ValueError(f"the decisions of {config.tag!r} are not known before a run")
    num_steps: dict[int, int] = {}
    for record in exact:
        if record.role == "denoise":
            num_steps[record.window] = max(num_steps.get(record.window, 0), record.step + 1)
    engine = Engine(config)
    window = None
    for record in exact:
        if record.window != window:
            engine.start_window()
            window = record.window
        step = ChunkStep(
            window=record.window,
            iteration=record.iteration,
            chunk=record.chunk,
            branch=record.branch,
            step=record.step,
            num_steps=num_steps[record.window],
            sigma=0.5,  # of no consequence: what is reused is zero at any time
            grid=(1, 1, record.tokens_total),
            kv_tokens=record.kv_tokens,
            dt=1.0,
        )
        empty = torch.zeros(1, record.tokens_total, 1)
        signals = Signals(empty, latents=empty)
        engine.finish(engine.run_blocks(step, signals, _no_blocks, record.role))
    return engine.trace.records


def _no_blocks(inputs: Tensor, index: Tensor | None) -> Tensor:
    return inputs
