"""Everything about a run that can be found wrong before the model is loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.checks import check_multiple
from common.errors import UserError
from common.settings import check_overlap
from skyreels_v2_motioncache.checkpoint import Architecture
from skyreels_v2_motioncache.settings import FILES, RunSettings
from skyreels_v2_motioncache.windows import Window, latent_frames, plan_windows, video_frames

PIPELINE_MULTIPLE = 16
"""The stock pipelines ask for heights and widths that 16 divides, whatever the model."""
TINY_WIDTH = 192
"""Channels of the tiny checkpoint. Its settings, which are the default, are of use for others of that size."""
SMALLER_CHUNKS = "a smaller causal_block_size"
PUBLISHED = {1536: ("1.3b_540p",), 5120: ("14b_540p", "14b_720p")}
"""Sizes that there are settings for, by the width of the model."""


def check_config_file(config: Path, architecture: Architecture) -> None:
    """Check that the tiny checkpoint's settings, which are the default, are not used for a larger model.

    Args:
        config: file that the settings came from.

    Raises:
        UserError: they are; names the files for a model of this width.
    """
    width = architecture.width
    if width <= TINY_WIDTH or not FILES.is_default(config):
        return
    sizes = PUBLISHED.get(width) or [size for same in PUBLISHED.values() for size in same]
    preset = config.stem.rpartition("_")[2]
    files = " or ".join(f"configs/{FILES.family}_{size}_{preset}.yaml" for size in sizes)
    own = "" if width in PUBLISHED else ", or a copy of one with settings for this model"
    raise UserError(
        f"config {config.name!r} is for the tiny checkpoint of {TINY_WIDTH} channels, and this model has {width}; "
        f"give --config {files}{own}"
    )


def check_shapes(settings: RunSettings, architecture: Architecture) -> list[Window]:
    """Check sizes and frame counts against the model, and plan the windows.

    Raises:
        UserError: names the value and the nearest ones that work.
    """
    factor = architecture.temporal_factor
    _check_picture(settings, architecture)
    _check_windows(settings, factor)
    if settings.kind == "image" and settings.causal_block_size > 1 and settings.addnoise_condition == 0:
        raise UserError(
            "addnoise_condition: 0 is not allowed with an image in chunks of several frames, as the model is then not "
            "told which frame is given; use 20"
        )
    problem = _problem(settings, factor)
    if problem:
        raise UserError(f"num_frames: {settings.num_frames} {problem}; use {_nearest(settings, factor)}")
    return _plan(settings, factor)


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


def _check_windows(settings: RunSettings, factor: int) -> None:
    """Where windows meet, their frames and those that they share fill whole chunks."""
    base, overlap = settings.base_num_frames, settings.overlap_history
    if settings.kind != "video" and settings.num_frames <= base:
        return
    if overlap is None:
        what = "a given video" if settings.kind == "video" else f"more than {base} frames"
        raise UserError(
            f"overlap_history: null is not allowed for {what}; use {_whole_chunks(settings, factor, 1, under=base)}"
        )
    problem = _not_whole(settings, factor, overlap)
    if not problem and overlap >= base:
        problem = f"leaves nothing to generate in windows of {base} frames"
    if problem:
        raise UserError(
            f"overlap_history: {overlap} {problem}; use {_whole_chunks(settings, factor, overlap, under=base)}"
        )
    problem = _not_whole(settings, factor, base)
    if problem and settings.num_frames > base:
        raise UserError(f"base_num_frames: {base} {problem}; use {_whole_chunks(settings, factor, base, over=overlap)}")


def _not_whole(settings: RunSettings, factor: int, frames: int) -> str | None:
    """What keeps so many frames from filling whole chunks, or None."""
    latents, block = latent_frames(frames, factor), settings.causal_block_size
    if frames % factor != 1:
        return f"is not {factor}·k + 1, as the video autoencoder needs"
    if latents % block:
        return f"frames are {latents} latent frames, which chunks of {block} do not fill"
    return None


def _whole_chunks(settings: RunSettings, factor: int, near: int, over: int = 0, under: float = math.inf) -> str:
    """The numbers of frames nearest to `near` that fill whole chunks, one below and one above, between two others."""
    count = max(1, latent_frames(near, factor) // settings.causal_block_size)
    fitting = [_blocks(settings, n, factor) for n in range(1, count + 2)]
    fitting = [frames for frames in fitting if over < frames < under][-2:]
    return " or ".join(map(str, fitting)) or SMALLER_CHUNKS


def _plan(settings: RunSettings, factor: int) -> list[Window]:
    return plan_windows(
        settings.kind,
        settings.num_frames,
        settings.base_num_frames,
        settings.overlap_history,
        settings.causal_block_size,
        factor,
    )


def _problem(settings: RunSettings, factor: int) -> str | None:
    """What keeps this number of frames from being made, or None."""
    block, overlap = settings.causal_block_size, settings.overlap_history
    if settings.num_frames % factor != 1:
        return f"is not {factor}·k + 1, as the video autoencoder needs"
    if settings.kind == "video" and settings.num_frames <= overlap:
        return f"includes the {overlap} frames taken over from the video and leaves none to generate"
    windows = _plan(settings, factor)
    for number, window in enumerate(windows, start=1):
        if window.frames % block:
            where = "is" if len(windows) == 1 else f"leaves window {number} of {len(windows)} with"
            return f"{where} {window.frames} latent frames, which chunks of {block} do not fill"
    if settings.kind == "image" and any(w.frames != windows[0].frames for w in windows):
        return "ends in a shorter window, which the image-to-video pipeline cannot make"
    return None


def _nearest(settings: RunSettings, factor: int) -> str:
    """The nearest frame counts that work, below and above."""

    def works(latents: int) -> bool:
        other = replace(settings, num_frames=video_frames(latents, factor))
        try:
            _check_windows(other, factor)
        except UserError:
            return False
        return _problem(other, factor) is None

    first_above = latent_frames(settings.num_frames, factor) + 1
    reach = latent_frames(settings.base_num_frames, factor) + settings.causal_block_size
    below = next((n for n in range(latent_frames(settings.num_frames - 1, factor), 0, -1) if works(n)), None)
    above = next((n for n in range(first_above, first_above + reach) if works(n)), None)
    found = [str(video_frames(n, factor)) for n in (below, above) if n is not None]
    return " or ".join(found) or SMALLER_CHUNKS


def _blocks(settings: RunSettings, count: int, factor: int) -> int:
    """Video frames of `count` whole chunks."""
    return video_frames(count * settings.causal_block_size, factor)
