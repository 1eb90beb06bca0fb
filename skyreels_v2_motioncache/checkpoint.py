"""Finding a checkpoint and checking it by its small files, before gigabytes are loaded."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs import REPOSITORY

TRANSFORMER = "SkyReelsV2Transformer3DModel"
VAE = "AutoencoderKLWan"
WEIGHTS = ("transformer", "vae", "text_encoder")
FOLDERS = (*WEIGHTS, "tokenizer", "scheduler")
SMALL_FILES = ["*.json", "*.model", "*.txt"]


@dataclass(frozen=True)
class Architecture:
    """What of a checkpoint's architecture a run's settings must agree with.

    Attributes:
        temporal_factor, spatial_factor: video frames and pixels per latent frame and latent pixel.
        patch: rows and columns of latents in a token.
    """

    temporal_factor: int
    spatial_factor: int
    patch: tuple[int, int]


def find_checkpoint(model: str, weights: bool = True) -> Path:
    """The folder of a model, fetched from the hub when it is a repository's name.

    A relative folder is looked for where the command was started and in this repository.

    Args:
        weights: False fetches only the small files that `inspect_checkpoint` reads.

    Raises:
        UserError: there is no such folder, or the hub does not give it.
    """
    for folder in (Path(model).expanduser(), REPOSITORY / model):
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) or (REPOSITORY / model).parent.is_dir():
        raise UserError(
            f"model {model!r} is neither a folder nor the name of a hub repository; "
            "give a folder in the diffusers layout or a name such as Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"
        )
    return _from_hub(model, weights)


def inspect_checkpoint(folder: Path, weights: bool = True) -> Architecture:
    """Check that a folder holds a whole SkyReels-V2 diffusion-forcing pipeline, and read its sizes.

    Args:
        weights: also compare every safetensors file's length with what its header promises.

    Raises:
        UserError: a file is missing or truncated, or the checkpoint is of another architecture.
    """
    index = _read_json(folder / "model_index.json")
    for name in FOLDERS:
        if name not in index or not (folder / name).is_dir():
            raise UserError(
                f"checkpoint {str(folder)!r} has no {name!r}; give a folder that save_pretrained wrote whole"
            )
    transformer, vae = _read_json(folder / "transformer/config.json"), _read_json(folder / "vae/config.json")
    for part, config, needed in (("transformer", transformer, TRANSFORMER), ("vae", vae, VAE)):
        found = config.get("_class_name")
        if found != needed:
            raise UserError(
                f"checkpoint {str(folder)!r} is of another architecture: its {part} is {found!r}, not {needed!r}; "
                "give a SkyReels-V2 diffusion-forcing (DF) checkpoint"
            )
    if transformer.get("image_dim") is not None or transformer["in_channels"] != vae["z_dim"]:
        raise UserError(
            f"checkpoint {str(folder)!r} is an image-to-video model with {transformer['in_channels']} input channels, "
            f"not a diffusion-forcing one with {vae['z_dim']}; give a SkyReels-V2 DF checkpoint"
        )
    if weights:
        for part in WEIGHTS:
            _check_weights(folder / part)
    down = vae["temperal_downsample"]
    return Architecture(2 ** sum(down), 2 ** len(down), tuple(transformer["patch_size"][1:]))


def _check_weights(folder: Path) -> None:
    """Raise unless all weight files of one part are there and as long as their headers say."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    if not files:
        raise UserError(f"checkpoint {str(folder.parent)!r} has no weights: no *.safetensors in {folder.name!r}")
    for file in files:
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length <= file.stat().st_size else {}
        except OSError as error:
            raise UserError(
                f"checkpoint file {str(file)!r} cannot be read: {error.strerror}; fetch it again"
            ) from error
        except (struct.error, ValueError):
            header = {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected, found = 8 + length + max(ends, default=-1) if ends else None, file.stat().st_size
        if expected != found:
            promise = f", its header promises {expected}" if expected else ", its header is damaged"
            raise UserError(f"checkpoint file {str(file)!r} is truncated: {found} bytes{promise}; fetch it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"checkpoint file {str(path)!r} is missing; give a folder in the diffusers layout") from error
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint file {str(path)!r} cannot be read: it is damaged; fetch it again") from error


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
