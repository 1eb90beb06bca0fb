"""Finding a checkpoint and checking it by its small files, before gigabytes are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.checkpoints import (
    check_class,
    check_tokenizer,
    check_weights,
    local_folder,
    read_index,
    read_json,
    value_of,
)
from common.errors import UserError
from common.runs import REPOSITORY

TRANSFORMER = "SkyReelsV2Transformer3DModel"
VAE = "AutoencoderKLWan"
WEIGHTS = ("transformer", "vae", "text_encoder")
FOLDERS = (*WEIGHTS, "tokenizer", "scheduler")
PIPELINE = "DiffusionForcing"
"""Part of the names of the pipelines that denoise chunk after chunk."""
EXAMPLE = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"
ADVICE = f"give a SkyReels-V2 diffusion-forcing (DF) checkpoint such as {EXAMPLE}"
SMALL_FILES = ["*.json", "*.model", "*.txt"]


@dataclass(frozen=True)
class Architecture:
    """What of a checkpoint's architecture a run's settings must agree with.

    Attributes:
        temporal_factor, spatial_factor: video frames and pixels per latent frame and latent pixel.
        patch: rows and columns of latents in a token.
        width: channels of a token.
    """

    temporal_factor: int
    spatial_factor: int
    patch: tuple[int, int]
    width: int


def find_checkpoint(model: str, weights: bool = True) -> Path:
    """The folder of a model, fetched from the hub when it is a repository's name.

    A relative folder is looked for where the command was started and in this repository.

    Args:
        weights: False fetches only the small files that `inspect_checkpoint` reads.

    Raises:
        UserError: there is no such folder, or the hub does not give it.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) or (REPOSITORY / model).parent.is_dir():
        raise UserError(
            f"model {model!r} is neither a folder nor the name of a hub repository; "
            f"give a folder in the diffusers layout or a name such as {EXAMPLE}"
        )
    return _from_hub(model, weights)


def inspect_checkpoint(folder: Path, weights: bool = True) -> Architecture:
    """Check that a folder holds a whole SkyReels-V2 diffusion-forcing pipeline, and read its sizes.

    Args:
        weights: also compare every safetensors file's length with what its header promises.

    Raises:
        UserError: a file is missing or truncated, or the checkpoint is of another architecture.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"checkpoint {str(folder)!r} has no model_index.json, so it is not in the diffusers layout; of those that "
            f"Skywork published take the one whose name ends in -Diffusers, such as {EXAMPLE}"
        )
    pipeline = read_index(folder, FOLDERS).get("_class_name")
    if PIPELINE not in str(pipeline):
        raise UserError(f"checkpoint {str(folder)!r} is of a {pipeline}, which denoises all frames at once; {ADVICE}")
    check_tokenizer(folder / "tokenizer")
    transformer, vae = folder / "transformer/config.json", folder / "vae/config.json"
    for part, path, needed in (("transformer", transformer, TRANSFORMER), ("vae", vae, VAE)):
        check_class(folder, part, read_json(path), [needed], ADVICE)
    channels, made = value_of(transformer, "in_channels"), value_of(vae, "z_dim")
    if read_json(transformer).get("image_dim") is not None or channels != made:
        raise UserError(
            f"checkpoint {str(folder)!r} is an image-to-video model with {channels} input channels, "
            f"not a diffusion-forcing one with {made}; {ADVICE}"
        )
    if weights:
        for part in WEIGHTS:
            check_weights(folder / part)
    down = value_of(vae, "temperal_downsample")
    width = value_of(transformer, "num_attention_heads") * value_of(transformer, "attention_head_dim")
    return Architecture(2 ** sum(down), 2 ** len(down), tuple(value_of(transformer, "patch_size")[1:]), width)


def _from_hub(model: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # only runs that use the hub pay for the import

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # the hub's errors share no base class: HTTP, offline, name and disk errors
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model {model!r} is no folder here and cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "check the name and the connection, or give a folder"
        ) from error
