"""A `Magi1Pipeline` from a checkpoint folder, on a device, in a dtype, offloaded or not."""

from __future__ import annotations

from pathlib import Path

import torch

from common.checkpoints import check_complete, loading
from common.compiling import compile_blocks
from common.devices import Offload
from common.offloading import offload_layers, offload_leaves
from magi1_motioncache.convert import load_published, load_special_tokens
from magi1_motioncache.folders import WEIGHTS, published_name, published_root, tokens_file
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.presets import variant


def load_pipeline(
    folder: Path, dtype: torch.dtype = torch.float32, special_tokens_file: str | None = None
) -> Magi1Pipeline:
    """Load a pipeline on the CPU. VAE and text encoder always stay in float32, and parts of the transformer do.

    Args:
        folder: as `inspect_checkpoint` accepts: in the diffusers layout, or a published variant's.
        dtype: of the transformer.
        special_tokens_file: `special_tokens.npz`; by default the checkpoint's own tokens, or that file beside it.

    Raises:
        UserError: the weights do not fit the configuration, or a file is damaged.
    """
    tokens = tokens_file(folder, special_tokens_file)
    name = published_name(folder)
    if name is not None:
        return load_published(published_root(folder), variant(name), name, tokens, dtype)
    given = {} if tokens is None else {"special_tokens": load_special_tokens(tokens)}
    with loading(folder):
        pipe = Magi1Pipeline.from_pretrained(
            str(folder), dtype={"default": torch.float32, "transformer": dtype}, local_files_only=True, **given
        )
    for part in WEIGHTS:
        check_complete(getattr(pipe, part), folder / part)
    return pipe


def place_pipeline(pipe: Magi1Pipeline, device: torch.device, offload: Offload = "none", compile: bool = False) -> None:
    """Move a pipeline to its device, or let diffusers move its parts there when they are at work.

    With `compile` its transformer's blocks are compiled at their first use.

    The autoencoder stays on the device either way: it runs between the chunks, and would push the transformer off.
    """
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        offload_layers(pipe.transformer, pipe.transformer.videodit_blocks.layers, device)
        for module in (pipe.vae, pipe.special_tokens):
            if module is not None:
                module.to(device)
        if pipe.text_encoder is not None:
            offload_leaves(pipe.text_encoder, device)
    else:
        pipe.to(device)
    if compile:
        compile_blocks(pipe.transformer)
