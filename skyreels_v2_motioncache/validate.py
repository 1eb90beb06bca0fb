"""Everything about a run that can be found wrong before the model is loaded."""

from __future__ import annotations

import math

import numpy as np

from common.checks import check_multiple
from common.errors import UserError
from common.settings import check_overlap
from skyreels_v2_motioncache.checkpoint import Architecture
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import Window, latent_frames, plan_windows, video_frames

PIPELINE_MULTIPLE = 16
"""The stock pipelines ask for heights and widths that 16 divides, whatever the model."""


def check_shapes(settings: RunSettings, architecture: Architecture) -> list[Window]:
    """Check sizes and frame counts against the model, and plan the windows.

    Raises:
        UserError: names the value and the nearest ones that work.
    """
    _check_picture(settings, architecture)
    _check_counts(settings, architecture.temporal_factor)
    if settings.kind == "image" and settings.causal_block_size > 1 and settings.addnoise_condition == 0:
        raise UserError(
            "addnoise_condition: 0 is not allowed with an image in chunks of several frames, as the model is then not "
            "told which frame is given; use 20"
        )
    windows = _plan(settings, settings.num_frames, architecture.temporal_factor)
    problem = _problem(settings, windows)
    if problem:
        raise UserError(f"num_frames: {settings.num_frames} {problem}; use {_nearest(settings, architecture)}")
    return windows


def check_given_video(settings: RunSettings, video: np.ndarray | None, factor: int) -> None:
    """Check that a given video is long enough to continue.

    Args:
        video: `[frames, height, width, 3]`, or None when there is none.
        factor: video frames per latent frame.

    Raises:
        UserError: it has fewer frames than `overlap_history`.
    """
    if video is not None:
        check_overlap(settings, len(video), shortest=_blocks(settings, 1, factor))


def _check_picture(settings: RunSettings, architecture: Architecture) -> None:
    rows, columns = architecture.patch
    for name, value, patch in (("height", settings.height, rows), ("width", settings.width, columns)):
        check_multiple(name, value, math.lcm(PIPELINE_MULTIPLE, architecture.spatial_factor * patch))


def _check_counts(settings: RunSettings, factor: int) -> None:
    """Frame counts one by one: 4k + 1, and whole chunks where windows meet."""
    counts = {"num_frames": settings.num_frames}
    long = settings.kind == "video" or settings.num_frames > settings.base_num_frames
    if long:
        counts["base_num_frames"] = settings.base_num_frames
        if settings.overlap_history is None:
            what = "a given video" if settings.kind == "video" else f"more than {settings.base_num_frames} frames"
            raise UserError(
                f"overlap_history: null is not allowed for {what}; "
                f"use {_blocks(settings, 1, factor)} or {_blocks(settings, 2, factor)}"
            )
        counts["overlap_history"] = settings.overlap_history
    for name, value in counts.items():
        if value % factor != 1:
            below = max(1, (value - 1) // factor * factor + 1)
            raise UserError(
                f"{name}: {value} is not {factor}·k + 1, as the video autoencoder needs; "
                f"use {below} or {below + factor}"
            )
    if not long:
        return
    if settings.overlap_history >= settings.base_num_frames:
        raise UserError(
            f"overlap_history: {settings.overlap_history} leaves nothing to generate in windows of "
            f"{settings.base_num_frames} frames; use {_blocks(settings, 1, factor)}"
        )
    for name in ("overlap_history", "base_num_frames"):
        if settings.kind == "video" and name == "base_num_frames" and settings.num_frames <= settings.base_num_frames:
            continue
        latents = latent_frames(counts[name], factor)
        if latents % settings.causal_block_size:
            below = max(1, latents // settings.causal_block_size)
            raise UserError(
                f"{name}: {counts[name]} frames are {latents} latent frames, which chunks of "
                f"{settings.causal_block_size} do not fill; "
                f"use {_blocks(settings, below, factor)} or {_blocks(settings, below + 1, factor)}"
            )
    if settings.kind == "video" and settings.num_frames <= settings.overlap_history:
        raise UserError(
            f"num_frames: {settings.num_frames} includes the {settings.overlap_history} frames taken over from the "
            f"video and leaves none to generate; use {_blocks(settings, 2, factor)} or more"
        )


def _plan(settings: RunSettings, num_frames: int, factor: int) -> list[Window]:
    return plan_windows(
        settings.kind,
        num_frames,
        settings.base_num_frames,
        settings.overlap_history,
        settings.causal_block_size,
        factor,
    )


def _problem(settings: RunSettings, windows: list[Window]) -> str | None:
    """What keeps these windows from running, or None."""
    block = settings.causal_block_size
    for number, window in enumerate(windows, start=1):
        if window.frames % block:
            where = "is" if len(windows) == 1 else f"leaves window {number} of {len(windows)} with"
            return f"{where} {window.frames} latent frames, which chunks of {block} do not fill"
    if settings.kind == "image" and any(w.frames != windows[0].frames for w in windows):
        return "ends in a shorter window, which the image-to-video pipeline cannot make"
    return None


def _nearest(settings: RunSettings, architecture: Architecture) -> str:
    """The nearest frame counts that work, below and above."""
    factor, current = architecture.temporal_factor, latent_frames(settings.num_frames, architecture.temporal_factor)
    least = latent_frames(settings.overlap_history, factor) + 1 if settings.kind == "video" else 1

    def works(n: int) -> bool:
        return not _problem(settings, _plan(settings, video_frames(n, factor), factor))

    reach = latent_frames(settings.base_num_frames, factor) + settings.causal_block_size
    below = next((n for n in range(current - 1, least - 1, -1) if works(n)), None)
    above = next((n for n in range(current + 1, current + reach + 1) if works(n)), None)
    return " or ".join(str(video_frames(n, factor)) for n in (below, above) if n is not None)


def _blocks(settings: RunSettings, count: int, factor: int) -> int:
    """Video frames of `count` whole chunks."""
    return video_frames(count * settings.causal_block_size, factor)
