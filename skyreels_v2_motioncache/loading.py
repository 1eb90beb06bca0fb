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

from common.errors import UserError
from skyreels_v2_motioncache.scheduler import OriginalSigmasUniPC
from skyreels_v2_motioncache.windows import Kind

PIPELINES: dict[Kind, type[DiffusionPipeline]] = {
    "text": SkyReelsV2DiffusionForcingPipeline,
    "image": SkyReelsV2DiffusionForcingImageToVideoPipeline,
    "video": SkyReelsV2DiffusionForcingVideoToVideoPipeline,
}
Offload = Literal["none", "model", "group"]


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device: {name!r} is not allowed; give 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cuda" and not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no CUDA device was found"
        raise UserError(f"device: {name!r} is not there, {built}; use --device cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The transformer's and text encoder's dtype; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_offload(offload: Offload, device: torch.device) -> None:
    """Raise a `UserError` when there is no GPU to offload from."""
    if offload != "none" and device.type != "cuda":
        raise UserError(f"offload: {offload!r} moves weights off a GPU and the device is {device}; use --offload none")


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
    try:
        pipe = PIPELINES[kind].from_pretrained(
            str(folder), dtype={"default": dtype, "vae": torch.float32}, local_files_only=True
        )
    except Exception as error:  # loaders of three libraries, each with errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be loaded ({type(error).__name__}: {reason}); fetch it again"
        ) from error
    scheduler = OriginalSigmasUniPC if sigmas == "original" else UniPCMultistepScheduler
    changes = {} if shift is None else {"flow_shift": shift}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def place_pipeline(pipe: Any, device: torch.device, offload: Offload = "none") -> None:
    """Move a pipeline to its device, or let diffusers move its parts there when they are at work."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)
    if offload != "none":
        pipe.vae.enable_tiling()
