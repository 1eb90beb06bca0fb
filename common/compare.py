"""The same video made in up to three ways on one pipeline: stock, exact, and with caching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from common import metrics
from common.cache import MotionCacheConfig, Trace
from common.console import Reporter
from common.generator import Denoised, Generator, Stock
from common.runs import Stage

EXACT = "exact"
STOCK = "stock"
OnStageFrames = Callable[[str, np.ndarray], None]


class NotFiniteError(ArithmeticError):
    """The model's numbers have left the range of its dtype."""


@dataclass
class Comparison:
    """What the stages left behind.

    Attributes:
        stages: in the order they ran, the method last.
        trace: of the method, with maps.
        tokens_total: token computations of exact execution.
        videos: decoded frames by stage name, `[frames, height, width, 3]` floats in [0, 1].
        stock_difference: largest absolute difference of the exact stage's latents from the whole stock run's.
    """

    stages: list[Stage] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    tokens_total: int = 0
    videos: dict[str, np.ndarray] = field(default_factory=dict)
    stock_difference: float | None = None


def compare(
    generator: Generator,
    method: str,
    cache: MotionCacheConfig,
    reporter: Reporter,
    on_frames: OnStageFrames,
    only_method: bool,
) -> Comparison:
    """Run the stages and measure them against each other.

    Args:
        generator: with prompts encoded.
        method: name of the way of caching; `"exact"` runs no third stage.
        cache: its settings.
        reporter: shows progress.
        on_frames: called with a stage's name and its video's next frames as soon as they are there, given frames first.
        only_method: leave the stages out that are only compared with.

    Raises:
        NotFiniteError: a stage's latents or frames hold what is no number.
    """
    done = Comparison()
    stock_latents = exact_latents = None
    if not only_method and generator.stock is not None:
        stock_latents = _stock(generator, generator.stock, reporter, on_frames, done)
    if method == EXACT or not only_method:
        exact = cache.replace(method="exact")  # keeps where K/V are stored
        exact_latents = _cached(generator, EXACT, exact, reporter, on_frames, done)
    if method != EXACT:
        _cached(generator, method, cache, reporter, on_frames, done)
    if stock_latents is not None and exact_latents is not None:
        done.stock_difference = float((stock_latents - exact_latents).abs().max())
    if EXACT in done.videos:
        for stage in done.stages:
            if stage.name in done.videos and stage.name != EXACT:
                stage.psnr_db = metrics.psnr(done.videos[stage.name], done.videos[EXACT])
                stage.ssim = metrics.ssim(done.videos[stage.name], done.videos[EXACT])
    return done


def _stock(
    generator: Generator, stock: Stock, reporter: Reporter, on_frames: OnStageFrames, done: Comparison
) -> Tensor | None:
    """The unmodified pipeline, whole or as many iterations as the settings say; latents of a whole run."""
    total = generator.total_iterations
    measured = None if stock.wanted == "full" or stock.wanted >= total else stock.wanted
    if measured is None:
        result = _made(generator, STOCK, reporter, on_frames)
        seconds = result.seconds
        done.videos[STOCK] = result.frames
    else:
        with reporter.stage(f"stock, {measured} of {total}", measured) as advance:
            seconds = stock.seconds(_finite(STOCK, generator.run(advance, stop_after=measured)))
    done.stages.append(Stage(STOCK, seconds, stock.flops, stock.tokens, measured))
    return result.latents.cpu() if measured is None else None


def _cached(
    generator: Generator,
    name: str,
    config: MotionCacheConfig,
    reporter: Reporter,
    on_frames: OnStageFrames,
    done: Comparison,
) -> Tensor:
    """One run with the engine attached; its latents."""
    handle = generator.attach(config, keep_maps=name != EXACT)
    try:
        result = _made(generator, name, reporter, on_frames)
        done.trace = handle.trace
    finally:
        generator.detach()
    if not done.trace.records:
        raise RuntimeError(f"{name}: the model ran without the cache; something has taken it off")
    done.trace.finish()
    totals = done.trace.totals()
    done.tokens_total = totals["tokens_total"]
    done.stages.append(Stage(name, result.seconds, generator.trace_flops(done.trace), totals["tokens_computed"]))
    done.videos[name] = result.frames
    return result.latents.cpu()


def _made(generator: Generator, name: str, reporter: Reporter, on_frames: OnStageFrames) -> Denoised:
    """A whole run with its frames, after one iteration that pays for what is set up at first use."""
    with reporter.busy(f"{name}: warming up"):
        _finite(name, generator.run(stop_after=1))

    def hand_over(frames: np.ndarray) -> None:
        if not np.isfinite(frames).all():
            raise NotFiniteError(f"{name}: frames are not finite")
        on_frames(name, frames)

    with reporter.stage(name, generator.total_iterations) as advance:
        result = _finite(name, generator.run(advance, on_frames=hand_over))
    if result.frames is not None:
        return result
    with reporter.busy(f"{name}: decoding"):
        frames = generator.decode(result.latents)
        hand_over(generator.with_given(frames))
    return replace(result, frames=frames)


def _finite(name: str, result: Denoised) -> Denoised:
    if not result.latents.isfinite().all():
        raise NotFiniteError(f"{name}: the latents are not finite after iteration {len(result.iteration_seconds)}")
    return result
