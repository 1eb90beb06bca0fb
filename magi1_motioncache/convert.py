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
from common.cli import Interrupted, Parser, run_command
from common.errors import UserError
from common.files import make_output_folder
from magi1_motioncache.checkpoint import load_transformer
from magi1_motioncache.folders import AUTOENCODER, TEXT_ENCODER, TRANSFORMERS, inspect_published, tokens_file
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.presets import VARIANTS, Variant, variant
from magi1_motioncache.special_tokens import SpecialTokens
from magi1_motioncache.vae import AutoencoderViTMagi1


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
    """A pipeline from the folders as they are published. Text encoder and autoencoder are in float32.

    Args:
        root: the folder `ckpt`, holding `magi/<name>/`, `vae/` and `t5/t5-v1_1-xxl/`.
        of: the variant.
        name: its folder's name.
        special_tokens: `special_tokens.npz`; without it captions get no such tokens.
        dtype: of the transformer.

    Raises:
        UserError: a file is missing or cut off, or a checkpoint does not fit; told before anything large is loaded
            where the files' sizes tell it.
    """
    inspect_published(root, of, name)
    tokens = None if special_tokens is None else load_special_tokens(special_tokens)
    # First of the large ones: of compressed shards nothing is known before they are read.
    transformer = load_transformer(root / TRANSFORMERS / name, of, dtype)
    with loading(root / AUTOENCODER):
        vae = AutoencoderViTMagi1.from_pretrained(root / AUTOENCODER, dtype=torch.float32)
    check_complete(vae, root / AUTOENCODER)
    with loading(root / TEXT_ENCODER):
        tokenizer = AutoTokenizer.from_pretrained(root / TEXT_ENCODER)
        text_encoder, found = T5EncoderModel.from_pretrained(
            root / TEXT_ENCODER, dtype=torch.float32, output_loading_info=True
        )
    if found["missing_keys"]:  # filled with random numbers
        raise UserError(f"{root / TEXT_ENCODER} lacks {min(found['missing_keys'])}, among others; fetch it again")
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
    tokens = tokens_file(args.root / TRANSFORMERS / args.variant, args.special_tokens)
    is_new = not args.output.exists()
    make_output_folder(args.output, "DIR")
    try:
        _write(load_published(args.root, of, args.variant, tokens), args.output)
    finally:
        if is_new and not any(args.output.iterdir()):
            args.output.rmdir()


def _write(pipe: Magi1Pipeline, folder: Path) -> None:
    """Write a pipeline; a folder that does not become whole is named."""
    incomplete = f"{str(folder)!r} is incomplete: convert again, or delete it"
    try:
        pipe.save_pretrained(folder)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(incomplete) from interrupt
    except Exception as error:  # what the writers of four libraries make of a full disk
        raise UserError(f"the pipeline cannot be written ({type(error).__name__}: {error}); {incomplete}") from error


if __name__ == "__main__":
    sys.exit(main())
