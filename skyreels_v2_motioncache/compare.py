"""The same video made in up to three ways on one pipeline: stock, exact, and with caching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from common import metrics
from common.cache import MotionCacheConfig, Trace
from common.console import Reporter
from common.runs import Stage
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.generate import Denoised, Generator

EXACT = "exact"
STOCK = "stock"
OnVideo = Callable[[str, np.ndarray], None]


@dataclass
class Comparison:
    """What the stages left behind.

    Attributes:
        stages: in the order they ran, the method last.
        trace: of the method, with maps.
        tokens_total: token computations of exact execution.
        videos: decoded frames by stage name, `[frames, height, width, 3]` floats in [0, 1].
        stock_difference: largest absolute difference of the exact stage's latents from the whole stock run's.
        has_prefix: whether a window starts with given frames.
    """

    stages: list[Stage] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    tokens_total: int = 0
    videos: dict[str, np.ndarray] = field(default_factory=dict)
    stock_difference: float | None = None
    has_prefix: bool = False


def compare(generator: Generator, method: str, reporter: Reporter, on_video: OnVideo, only_method: bool) -> Comparison:
    """Run the stages and measure them against each other.

    Args:
        generator: with prompts encoded.
        method: name of the settings' way of caching; `"exact"` runs no third stage.
        reporter: shows progress.
        on_video: called with a stage's name and its decoded frames as soon as they are there.
        only_method: leave the stages out that are only compared with.
    """
    settings = generator.settings
    done = Comparison(has_prefix=any(window.prefix for window in generator.windows))
    stock_latents = exact_latents = None
    if not only_method and settings.stock != "none":
        stock_latents = _stock(generator, reporter, on_video, done)
    if method == EXACT or not only_method:
        exact = settings.cache.replace(method="exact")  # keeps where K/V are stored
        exact_latents = _cached(generator, EXACT, exact, reporter, on_video, done)
    if method != EXACT:
        _cached(generator, method, settings.cache, reporter, on_video, done)
    if stock_latents is not None and exact_latents is not None:
        done.stock_difference = float((stock_latents - exact_latents).abs().max())
    if EXACT in done.videos:
        for stage in done.stages:
            if stage.name in done.videos and stage.name != EXACT:
                stage.psnr_db = metrics.psnr(done.videos[stage.name], done.videos[EXACT])
                stage.ssim = metrics.ssim(done.videos[stage.name], done.videos[EXACT])
    return done


def _stock(generator: Generator, reporter: Reporter, on_video: OnVideo, done: Comparison) -> Tensor | None:
    """The unmodified pipeline, whole or as many iterations as the settings say; latents of a whole run."""
    wanted = generator.settings.stock
    total = sum(generator.iterations)
    measured = None if wanted == "full" or wanted >= total else wanted
    if measured is None:
        result = _timed(generator, STOCK, reporter, total)
        seconds = result.seconds
        done.videos[STOCK] = _decoded(generator, STOCK, result.latents, reporter, on_video)
    else:
        with reporter.stage(f"stock, {measured} of {total}", measured) as advance:
            seconds = generator.stock_seconds(generator.run(advance, stop_after=measured))
    done.stages.append(Stage(STOCK, seconds, generator.stock_flops(), generator.stock_tokens(), measured))
    return result.latents.cpu() if measured is None else None


def _cached(
    generator: Generator,
    name: str,
    config: MotionCacheConfig,
    reporter: Reporter,
    on_video: OnVideo,
    done: Comparison,
) -> Tensor:
    """One run with the engine attached; its latents."""
    settings, pipe = generator.settings, generator.pipe
    handle = apply_motioncache(pipe, config, prefix_noise=settings.prefix_noise, keep_maps=name != EXACT)
    try:
        result = _timed(generator, name, reporter, sum(generator.iterations))
        done.trace = handle.trace
    finally:
        remove_motioncache(pipe)
    done.trace.finish()
    totals = done.trace.totals()
    done.tokens_total = totals["tokens_total"]
    flops = model_cost(pipe.transformer, settings.max_sequence_length).trace_flops(done.trace)
    done.stages.append(Stage(name, result.seconds, flops, totals["tokens_computed"]))
    done.videos[name] = _decoded(generator, name, result.latents, reporter, on_video)
    return result.latents.cpu()


def _timed(generator: Generator, name: str, reporter: Reporter, iterations: int) -> Denoised:
    """A whole run, after one iteration that pays for what is set up at first use."""
    with reporter.busy(f"{name}: warming up"):
        generator.run(stop_after=1)
    with reporter.stage(name, iterations) as advance:
        return generator.run(advance)


def _decoded(generator: Generator, name: str, latents: Tensor, reporter: Reporter, on_video: OnVideo) -> np.ndarray:
    with reporter.busy(f"{name}: decoding"):
        frames = generator.decode(latents)
        on_video(name, frames)
    return frames


def latent_to_frame(latent: int, temporal_factor: int) -> int:
    """A video frame in the middle of those that a latent frame decodes to."""
    return 0 if latent == 0 else (latent - 1) * temporal_factor + 1 + temporal_factor // 2


def chunk_frames(generator: Generator, frames: np.ndarray, window: int, chunk: int) -> np.ndarray:
    """One decoded frame for each latent frame of a chunk, `[block, height, width, 3]`."""
    pipe: Any = generator.pipe
    block = generator.settings.causal_block_size
    plan = generator.windows[window]
    block = block if block > 1 else plan.frames
    first = plan.start + chunk * block
    return frames[[latent_to_frame(first + i, pipe.vae_scale_factor_temporal) for i in range(block)]]
