"""Everything about a run that can be found wrong before the model is loaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from common.checks import check_multiple, check_range, near_miss
from common.errors import UserError
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.folders import Architecture
from magi1_motioncache.settings import FILES, RunSettings
from magi1_motioncache.special_tokens import SpecialTokenOptions
from magi1_motioncache.transformer import PATCH


def check_config_file(config: Path, architecture: Architecture) -> None:
    """Check that the tiny checkpoint's settings, which are the default, are not used for a published model.

    Args:
        config: file that the settings came from.

    Raises:
        UserError: they are; names the file for the model.
    """
    variant = architecture.variant
    if variant is not None and FILES.is_default(config):
        raise UserError(
            f"config {config.name!r} is the tiny checkpoint's, and this model is MAGI-1 {variant}; "
            f"give --config configs/{FILES.nearest(variant).name}"
        )


def sampling_options(settings: RunSettings, checkpoint: SamplingConfig) -> SamplingConfig:
    """How to sample: the checkpoint's options, changed by those of the run.

    Raises:
        UserError: options that do not fit together or not to the checkpoint.
    """
    window = settings.sampling.get("window_size", checkpoint.window_size)
    if window > 0:
        check_multiple("steps", settings.steps, window, f" (window_size), so no chunk of {window} would be finished")
    sampling = checkpoint.replace(num_steps=settings.steps, fps=settings.fps, **settings.sampling)
    passes = 1 if checkpoint.distill else 3
    if sampling.cfg_number != passes:
        kind = "distilled checkpoint, its guidance is built in" if checkpoint.distill else "base checkpoint"
        raise UserError(
            f"sampling.cfg_number: {sampling.cfg_number} is not allowed for a {kind}; give the --config of such a "
            f"model, or --set sampling.cfg_number={passes}"
        )
    if settings.guidance_scale is None:
        return sampling
    if sampling.cfg_number == 1:
        raise UserError(
            f"guidance_scale: {settings.guidance_scale:g} is not allowed with one pass (sampling.cfg_number 1); "
            "leave it out"
        )
    return sampling.replace(text_scales=[settings.guidance_scale if x else x for x in sampling.text_scales])


def check_shapes(settings: RunSettings, architecture: Architecture) -> SamplingConfig:
    """Check sizes and frame counts against the model; how to sample.

    Raises:
        UserError: names the value and the nearest ones that work.
    """
    sampling = sampling_options(settings, architecture.sampling)
    token = architecture.spatial_factor * PATCH
    for name in ("height", "width"):
        check_multiple(name, getattr(settings, name), token)
        check_range(name, getattr(settings, name), 2 * token)
    factor = sampling.temporal_downsample_factor
    whole = sampling.chunk_width * factor
    check_multiple("num_frames", settings.num_frames, whole, f", the frames of a chunk of {sampling.chunk_width}")
    if settings.kind == "video":
        check_multiple("overlap_history", settings.overlap_history, factor, ", the frames of a latent frame")
        if settings.num_frames <= settings.overlap_history:
            least = (settings.overlap_history // whole + 1) * whole
            raise UserError(
                f"num_frames: {settings.num_frames} includes the {settings.overlap_history} frames taken over from the "
                f"video and leaves none to generate; use {least} or more"
            )
    return sampling


def token_options(settings: RunSettings, has_tokens: bool) -> SpecialTokenOptions | None:
    """Which special tokens to use; None for those that the pipeline takes by itself.

    Raises:
        UserError: an unknown token, or tokens that the checkpoint does not have.
    """
    if settings.special_tokens is None:
        return None
    known = [field.name for field in fields(SpecialTokenOptions)]
    for name in settings.special_tokens:
        if name not in known:
            raise UserError(f"unknown special token {name!r}; {near_miss(name, known)}")
    if settings.special_tokens and not has_tokens:
        raise UserError(
            f"special_tokens: {list(settings.special_tokens)} are not in this checkpoint; give special_tokens.npz of "
            "the MAGI-1 code (example/assets) as --set special_tokens_file=FILE, or --set special_tokens=[]"
        )
    return SpecialTokenOptions(**dict.fromkeys(settings.special_tokens, True))
