"""A stock SkyReels-V2 pipeline from a checkpoint folder, on a device, in a dtype, offloaded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DiffusionPipeline,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    UniPCMultistepScheduler,
)

from common.checkpoints import check_complete, loading
from common.compiling import compile_blocks
from common.convolutions import use_onednn
from common.devices import Offload
from common.offloading import offload_layers, offload_leaves
from common.settings import Kind
from skyreels_v2_motioncache.checkpoint import WEIGHTS
from skyreels_v2_motioncache.scheduler import OriginalSigmasUniPC

PIPELINES: dict[Kind, type[DiffusionPipeline]] = {
    "text": SkyReelsV2DiffusionForcingPipeline,
    "image": SkyReelsV2DiffusionForcingImageToVideoPipeline,
    "video": SkyReelsV2DiffusionForcingVideoToVideoPipeline,
}


def load_pipeline(
    folder: Path,
    kind: Kind = "text",
    dtype: torch.dtype = torch.float32,
    shift: float | None = None,
    sigmas: Literal["original", "diffusers"] = "original",
) -> Any:
    """Load the stock pipeline for a kind of input, on the CPU.

    The dtype is given to the loader, which leaves the parts of the transformer that must stay in float32 (time
    embedding, norms, modulation tables) as they are; `pipe.to(dtype)` would not. The VAE always stays in float32.

    Args:
        folder: checkpoint in the diffusers layout, as `inspect_checkpoint` accepts.
        kind: what the video is made from; the three pipelines share all parts.
        shift: flow shift; None keeps the checkpoint's.
        sigmas: which noise levels the scheduler uses.

    Raises:
        UserError: the weights do not fit the configuration, or a file is damaged.
    """
    with loading(folder):
        pipe = PIPELINES[kind].from_pretrained(
            str(folder), dtype={"default": dtype, "vae": torch.float32}, local_files_only=True
        )
    for part in WEIGHTS:
        check_complete(getattr(pipe, part), folder / part)
    scheduler = OriginalSigmasUniPC if sigmas == "original" else UniPCMultistepScheduler
    changes = {} if shift is None else {"flow_shift": shift}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def place_pipeline(pipe: Any, device: torch.device, offload: Offload = "none", compile: bool = False) -> None:
    """Move a pipeline to its device, or let diffusers move its parts there when they are at work.

    With `compile` its transformer's blocks are compiled at their first use.
    """
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        offload_layers(pipe.transformer, pipe.transformer.blocks, device)
        offload_leaves(pipe.text_encoder, device)
        pipe.vae.to(device)
    else:
        pipe.to(device)
        if device.type == "cpu":
            use_onednn(pipe.vae)
    if offload != "none":
        pipe.vae.enable_tiling()
    if compile:
        compile_blocks(pipe.transformer)
