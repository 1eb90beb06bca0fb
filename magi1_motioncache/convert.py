"""Published checkpoints -> one folder that `Magi1Pipeline.from_pretrained` opens."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, T5EncoderModel

from common.errors import UserError
from magi1_motioncache.checkpoint import load_transformer
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.presets import VARIANTS, Variant, variant
from magi1_motioncache.special_tokens import SpecialTokens
from magi1_motioncache.vae import AutoencoderViTMagi1

TRANSFORMERS = "magi"
AUTOENCODER = "vae"
TEXT_ENCODER = "t5/t5-v1_1-xxl"
TOKENS_FILE = "special_tokens.npz"


def load_special_tokens(path: Path) -> SpecialTokens:
    """The published `special_tokens.npz`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        with np.load(path) as stored:
            values = {name: torch.from_numpy(stored[name].astype(np.float16)).float() for name in stored}
        tokens = SpecialTokens(values["caption_token"].shape[1], len(values["other_tokens"]))
        tokens.load_state_dict(values)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; it comes with the original code, in example/assets") from error
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} does not hold the special tokens ({error})") from error
    return tokens


def load_published(
    root: Path, of: Variant, name: str, special_tokens: Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> Magi1Pipeline:
    """A pipeline from the folders as they are published.

    Args:
        root: the folder `ckpt`, holding `magi/<name>/`, `vae/` and `t5/t5-v1_1-xxl/`.
        of: the variant.
        name: its folder's name.
        special_tokens: `special_tokens.npz`; by default the one in `root`. Without any, captions get no such tokens.
        dtype: of the transformer.

    Raises:
        UserError: a folder is missing, or a checkpoint does not fit.
    """
    for part in (f"{TRANSFORMERS}/{name}", AUTOENCODER, TEXT_ENCODER):
        if not (root / part).is_dir():
            raise UserError(f"{root / part} is missing; give the folder that holds magi, vae and t5")
    if special_tokens is None and (root / TOKENS_FILE).is_file():
        special_tokens = root / TOKENS_FILE
    return Magi1Pipeline(
        tokenizer=AutoTokenizer.from_pretrained(root / TEXT_ENCODER),
        text_encoder=T5EncoderModel.from_pretrained(root / TEXT_ENCODER),
        transformer=load_transformer(root / TRANSFORMERS / name, of, dtype),
        vae=AutoencoderViTMagi1.from_pretrained(root / AUTOENCODER),
        special_tokens=None if special_tokens is None else load_special_tokens(special_tokens),
        sampling=of.sampling.to_dict(),
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line: `python -m magi1_motioncache.convert ckpt 4.5B_distill models/magi1-4.5b-distill`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder that holds magi, vae and t5")
    parser.add_argument("variant", help=", ".join(VARIANTS))
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--special-tokens", type=Path, help="special_tokens.npz of the original code, if not in root")
    options = parser.parse_args(arguments)
    try:
        pipeline = load_published(options.root, variant(options.variant), options.variant, options.special_tokens)
    except UserError as error:
        parser.error(str(error))
    pipeline.save_pretrained(options.output)


if __name__ == "__main__":
    main()
