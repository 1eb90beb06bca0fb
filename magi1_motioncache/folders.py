"""Finding a checkpoint and checking it by its small files, before gigabytes are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from magi1_motioncache.checkpoint import COMPRESSED, weights_folder
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.presets import VARIANTS, Variant

TRANSFORMER = "Magi1Transformer3DModel"
AUTOENCODERS = ("AutoencoderViTMagi1", "ViTVAE")
WEIGHTS = ("transformer", "vae", "text_encoder")
FOLDERS = (*WEIGHTS, "tokenizer")
# As the models are published.
TRANSFORMERS = "magi"
AUTOENCODER = "vae"
TEXT_ENCODER = "t5/t5-v1_1-xxl"
TOKENS_FILE = "special_tokens.npz"
WANTED = (
    "one that python -m magi1_motioncache.convert wrote, or a published variant's folder such as "
    f"ckpt/{TRANSFORMERS}/4.5B_distill (see docs/magi1.md)"
)


@dataclass(frozen=True)
class Architecture:
    """What of a checkpoint's architecture a run's settings must agree with.

    Attributes:
        spatial_factor: pixels per latent pixel.
        sampling: options of the checkpoint.
        has_tokens: whether it holds special tokens, or their file lies beside it.
        variant: the published model that it is, told by its sizes; None for any other.
    """

    spatial_factor: int
    sampling: SamplingConfig
    has_tokens: bool
    variant: str | None = None


def find_checkpoint(model: str) -> Path:
    """The folder of a model. A relative one is looked for where the command was started and in this repository.

    Raises:
        UserError: there is no such folder.
    """
    folder = local_folder(model)
    if folder is None:
        raise UserError(f"model {model!r} is not a folder; give {WANTED}")
    return folder


def published_name(folder: Path) -> str | None:
    """The variant that a folder in the published layout holds; None for one in the diffusers layout."""
    name = _in_layout(folder).name
    return name if name in VARIANTS and not (folder / "model_index.json").exists() else None


def published_root(folder: Path) -> Path:
    """The folder that holds `magi`, `vae` and `t5`, for a variant's folder in it."""
    return _in_layout(folder).parent.parent


def tokens_file(folder: Path, given: str | Path | None) -> Path | None:
    """The special tokens' file: the one that is given, or one beside the weights."""
    if given is not None:
        return Path(given).expanduser()
    places = [folder] if published_name(folder) is None else [folder, published_root(folder)]
    return next((place / TOKENS_FILE for place in places if (place / TOKENS_FILE).is_file()), None)


def inspect_checkpoint(folder: Path, given_tokens: str | None = None) -> Architecture:
    """Check that a folder holds a whole MAGI-1 pipeline, and read its sizes.

    Args:
        folder: in the diffusers layout, or a published variant's.
        given_tokens: `special_tokens_file` of the settings.

    Raises:
        UserError: a file is missing or truncated, or the checkpoint is of another architecture.
    """
    found = tokens_file(folder, given_tokens)
    if found is not None and not found.is_file():
        raise UserError(
            f"special_tokens_file {str(found)!r} does not exist; it lies in example/assets of the MAGI-1 code"
        )
    name = published_name(folder)
    if name is not None:
        of = VARIANTS[name]
        factor = inspect_published(published_root(folder), of, name)
        return Architecture(factor, of.sampling, found is not None, name)
    _check_layout(folder)
    index = read_index(folder, FOLDERS)
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(folder / "vae/config.json")
    check_class(folder, "transformer", transformer, [TRANSFORMER], "give a MAGI-1 checkpoint")
    check_class(folder, "vae", vae, AUTOENCODERS, "give a MAGI-1 checkpoint")
    channels = value_of(folder / "transformer/config.json", "in_channels")
    channels //= 2 if transformer.get("half_channel_vae") else 1
    made = value_of(folder / "vae/config.json", "ddconfig", "z_chans")
    if channels != made:
        raise UserError(
            f"checkpoint {str(folder)!r} does not fit together: its transformer takes latents of {channels} channels "
            f"and its vae makes {made}; convert it again"
        )
    for part in WEIGHTS:
        check_weights(folder / part)
    check_tokenizer(folder / "tokenizer")
    sampling = SamplingConfig.from_dict(index.get("sampling") or {})
    has_tokens = found is not None or (folder / "special_tokens").is_dir()
    return Architecture(_patch_size(folder / "vae"), sampling, has_tokens, _variant_of(transformer, sampling.distill))


def inspect_published(root: Path, of: Variant, name: str) -> int:
    """Check that a variant's files are all there, as they are published.

    Args:
        root: the folder `ckpt`, holding `magi/<name>/`, `vae/` and `t5/t5-v1_1-xxl/`.
        of: the variant.
        name: its folder's name.

    Returns:
        Pixels per latent pixel.

    Raises:
        UserError: a folder or file is missing, or a file is truncated.
    """
    transformer, vae, text = root / TRANSFORMERS / name, root / AUTOENCODER, root / TEXT_ENCODER
    for part in (transformer, vae, text):
        if not part.is_dir():
            raise UserError(f"{str(part)!r} is missing; the folder {str(root)!r} must hold magi, vae and t5")
    check_weights(weights_folder(transformer, of), packed=COMPRESSED)
    check_weights(vae)
    read_json(text / "config.json")
    check_weights(text, pickled=True)
    check_tokenizer(text)
    return _patch_size(vae)


def _in_layout(folder: Path) -> Path:
    """A variant's folder by the path on which `vae` lies beside `magi`: the one that is given, or where links lead."""
    paths = [Path(os.path.abspath(folder)), folder.resolve()]
    return next((p for p in paths if p.name in VARIANTS and (p.parent.parent / AUTOENCODER).is_dir()), paths[0])


def _check_layout(folder: Path) -> None:
    """Refuse a folder that is in no layout, with the variants' folders in it or around it, where there are any."""
    if (folder / "model_index.json").exists():
        return
    path = Path(os.path.abspath(folder))
    near = [place / name for place in (path / TRANSFORMERS, path) for name in VARIANTS]
    near += [path.parent] if path.parent.name in VARIANTS else []
    found = [repr(str(place)) for place in near if place.is_dir()]
    raise UserError(f"model {str(folder)!r} is not a variant's folder; give {' or '.join(found) or WANTED}")


def _variant_of(transformer: dict[str, Any], distill: bool) -> str | None:
    """The published variant of a configuration's sizes; quantised ones are not told from the others."""
    for name, of in VARIANTS.items():
        same_sizes = all(transformer.get(key) == value for key, value in of.transformer.items())
        if same_sizes and of.sampling.distill == distill:
            return name
    return None


def _patch_size(vae: Path) -> int:
    return value_of(vae / "config.json", "ddconfig", "patch_size")
