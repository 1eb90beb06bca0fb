"""Finding a checkpoint and checking it by its small files, before gigabytes are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.checkpoints import check_class, check_weights, local_folder, read_index, read_json, value_of
from common.errors import UserError
from magi1_motioncache.checkpoint import COMPRESSED
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.convert import AUTOENCODER, TEXT_ENCODER, TOKENS_FILE
from magi1_motioncache.presets import VARIANTS

TRANSFORMER = "Magi1Transformer3DModel"
AUTOENCODERS = ("AutoencoderViTMagi1", "ViTVAE")
WEIGHTS = ("transformer", "vae", "text_encoder")
FOLDERS = (*WEIGHTS, "tokenizer")


@dataclass(frozen=True)
class Architecture:
    """What of a checkpoint's architecture a run's settings must agree with.

    Attributes:
        spatial_factor: pixels per latent pixel.
        sampling: options of the checkpoint.
        has_tokens: whether it holds special tokens, or their file lies beside it.
    """

    spatial_factor: int
    sampling: SamplingConfig
    has_tokens: bool


def find_checkpoint(model: str) -> Path:
    """The folder of a model. A relative one is looked for where the command was started and in this repository.

    Raises:
        UserError: there is no such folder.
    """
    folder = local_folder(model)
    if folder is None:
        raise UserError(
            f"model {model!r} is not a folder; give one that python -m magi1_motioncache.convert wrote, or a published "
            "variant's folder such as ckpt/magi/4.5B_distill (see docs/magi1.md)"
        )
    return folder


def published_name(folder: Path) -> str | None:
    """The variant that a folder in the published layout holds; None for one in the diffusers layout."""
    folder = folder.resolve()
    return folder.name if folder.name in VARIANTS and not (folder / "model_index.json").exists() else None


def published_root(folder: Path) -> Path:
    """The folder that holds `magi`, `vae` and `t5`, for a variant's folder in it."""
    return folder.resolve().parent.parent


def tokens_file(folder: Path, given: str | None) -> Path | None:
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
        return _inspect_published(folder, name, found is not None)
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
    has_tokens = found is not None or (folder / "special_tokens").is_dir()
    return Architecture(_patch_size(folder / "vae"), SamplingConfig.from_dict(index.get("sampling") or {}), has_tokens)


def _inspect_published(folder: Path, name: str, has_tokens: bool) -> Architecture:
    root, of = published_root(folder), VARIANTS[name]
    for part in (AUTOENCODER, TEXT_ENCODER):
        if not (root / part).is_dir():
            raise UserError(f"{str(root / part)!r} is missing; fetch it beside {str(root / 'magi')!r}")
    weights = folder / of.weights
    if not weights.is_dir():
        raise UserError(f"checkpoint {str(folder)!r} has no {of.weights!r}; fetch it again")
    check_weights(weights, packed=COMPRESSED)
    check_weights(root / AUTOENCODER)
    return Architecture(_patch_size(root / AUTOENCODER), of.sampling, has_tokens)


def _patch_size(vae: Path) -> int:
    return value_of(vae / "config.json", "ddconfig", "patch_size")
