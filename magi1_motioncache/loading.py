"""A `Magi1Pipeline` from a checkpoint folder, on a device, in a dtype, offloaded or not."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from common.checkpoints import check_complete, loading
from common.compiling import compile_blocks
from common.devices import Offload
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
        _offload_layers(pipe, device)
    else:
        pipe.to(device)
    if compile:
        compile_blocks(pipe.transformer)


def _offload_layers(pipe: Magi1Pipeline, device: torch.device) -> None:
    on, off, stream = device, torch.device("cpu"), device.type == "cuda"
    layers = pipe.transformer.videodit_blocks.layers
    # The sampler calls layers, not the transformer as a whole; what is not in a layer is small.
    for module in (pipe.vae, pipe.special_tokens, *_without(pipe.transformer, layers)):
        if module is not None:
            module.to(device)
    blocks = nn.ModuleDict({"layers": layers})
    apply_group_offloading(blocks, on, off, "block_level", num_blocks_per_group=1, use_stream=stream)
    if pipe.text_encoder is not None:
        apply_group_offloading(pipe.text_encoder, on, off, "leaf_level", use_stream=stream)


def _without(module: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The largest submodules of `module` that neither are nor hold `part`."""
    found = []
    for child in module.children():
        if child is part:
            continue
        found += _without(child, part) if any(m is part for m in child.modules()) else [child]
    return found
