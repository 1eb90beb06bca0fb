"""Published checkpoints -> one folder that `Magi1Pipeline.from_pretrained` opens.

    python -m magi1_motioncache.convert ckpt 4.5B_distill models/magi1-4.5b-distill

CKPT is laid out as on the hub; special_tokens.npz of the original code may lie in it. fp8 weights come out in bfloat16.
Everything is held in main memory once: about 30 GB for 4.5B, 70 GB for 24B. `docs/magi1.md` says what to fetch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, T5EncoderModel

from common.checkpoints import check_complete, loading
from common.cli import Parser, run_command
from common.errors import UserError
from common.files import make_output_folder
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
    """The published `special_tokens.npz`, rounded to fp16 as the models were trained with and kept in fp32.

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
    except Exception as error:  # numpy, zipfile and torch each have errors of their own
        raise UserError(
            f"{path} does not hold the special tokens ({type(error).__name__}: {error}); fetch it again"
        ) from error
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
    tokens = None if special_tokens is None else load_special_tokens(special_tokens)
    with loading(root / AUTOENCODER):
        vae = AutoencoderViTMagi1.from_pretrained(root / AUTOENCODER)
    check_complete(vae, root / AUTOENCODER)
    with loading(root / TEXT_ENCODER):
        tokenizer = AutoTokenizer.from_pretrained(root / TEXT_ENCODER)
        text_encoder, found = T5EncoderModel.from_pretrained(root / TEXT_ENCODER, output_loading_info=True)
    if found["missing_keys"]:  # filled with random numbers
        raise UserError(f"{root / TEXT_ENCODER} lacks {min(found['missing_keys'])}, among others; fetch it again")
    transformer = load_transformer(root / TRANSFORMERS / name, of, dtype)
    return Magi1Pipeline(tokenizer, text_encoder, transformer, vae, tokens, of.sampling.to_dict())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = Parser.of_module("magi1_motioncache.convert", __doc__)
    parser.add_argument("root", type=Path, metavar="CKPT", help="folder that holds magi, vae and t5")
    parser.add_argument("variant", metavar="VARIANT", help=f"folder in magi: {', '.join(VARIANTS)}")
    parser.add_argument("output", type=Path, metavar="DIR", help="folder to write, for --model of the run script")
    parser.add_argument(
        "--special-tokens", type=Path, metavar="FILE", help="special_tokens.npz of the original code (CKPT's own)"
    )
    args = parser.parse_args(argv)
    of = variant(args.variant)
    make_output_folder(args.output)
    load_published(args.root, of, args.variant, args.special_tokens).save_pretrained(args.output)


if __name__ == "__main__":
    sys.exit(main())
