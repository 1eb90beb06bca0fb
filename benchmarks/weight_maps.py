"""A chunk's motion weights over its denoising steps, from one video (the paper's Figures 5 and 6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from benchmarks.plots import new_figure, styled
from benchmarks.subject import load_subject
from common.cache import Trace
from common.cache.trace import StepMaps
from common.errors import UserError
from common.report import pick_chunk

STEPS = 6
"""Steps shown."""
PANE = 1.25
"""Inches of a frame's width."""


def draw_weights(config: Path, prompt: str | None = None, seed: int | None = None) -> Figure:
    """Make a video and draw the weights of one chunk: latent frames from left to right, steps from top to bottom.

    Args:
        config: YAML file of either model, of a method that weighs tokens.
        prompt, seed: instead of the config's.

    Raises:
        UserError: the method weighs no tokens.
    """
    subject = load_subject(config)
    settings = subject.settings
    if not settings.cache.token_level:
        raise UserError(f"config {str(config)!r} weighs no tokens (α = 1, or another method); give a MotionCache one")
    generator = subject.generator(prompt or settings.prompt, settings.seed if seed is None else seed)
    handle = generator.attach(settings.cache, keep_maps=True)
    try:
        denoised = generator.run()
        trace = handle.trace
    finally:
        generator.detach()
    window, chunk = pick_chunk(trace)
    frames = generator.chunk_frames(generator.decode(denoised.latents), window, chunk)
    return weights_figure(trace, window, chunk, frames, f"{subject.folder.name}, chunk {chunk}")


@styled()
def weights_figure(trace: Trace, window: int, chunk: int, frames: np.ndarray, title: str) -> Figure:
    """The drawing of `draw_weights`.

    Args:
        trace: recorded with `keep_maps=True`.
        window, chunk: which chunk.
        frames: `[frames of the chunk, height, width, 3]` in [0, 1].
        title: of the figure.

    Raises:
        UserError: all weights of the chunk are equal at all steps.
    """
    maps = _chosen([m for m in trace.maps if (m.record.window, m.record.chunk) == (window, chunk)])
    scale = Normalize(min(float(m.weights.min()) for m in maps), 1.0)
    figure, axes = new_figure(len(frames), heights=(1,) * (len(maps) + 1))
    height, width = frames.shape[1:3]
    figure.set_size_inches(PANE * len(frames) + 1.6, PANE * height / width * (len(maps) + 1) + 0.8)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    for column, frame in enumerate(frames):
        axes[column].imshow(frame)
        axes[column].set_title(f"latent frame {column}")
    for row, step in enumerate(maps, start=1):
        for column, weights in enumerate(step.weights.numpy()):
            axis = axes[row * len(frames) + column]
            axis.imshow(weights, cmap="viridis", norm=scale, interpolation="nearest", extent=(0, width, height, 0))
        axes[row * len(frames)].set_ylabel(f"step {step.record.step}")
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label="motion weight", shrink=0.6)
    figure.suptitle(title, parse_math=False)
    return figure


def _chosen(maps: list[StepMaps]) -> list[StepMaps]:
    """Maps of the first branch at steps that weigh tokens, spread evenly from the first to the last of them."""
    weighed = [m for m in maps if m.record.branch == maps[0].record.branch and m.weights.min() < m.weights.max()]
    if not weighed:
        raise UserError("no step of this video weighed its tokens: its chunk phase was never over; lower chunk_phase")
    picked = np.unique(np.linspace(0, len(weighed) - 1, min(STEPS, len(weighed))).round().astype(int))
    return [weighed[i] for i in picked]
