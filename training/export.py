"""Writing a trained model as a diffusers pipeline folder, weights in float16.

The text encoder's stay float32: transformers loads weights in the type they are stored in, and it is too small to
matter.
"""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler
from torch import nn
from transformers import PreTrainedTokenizerFast

from magi1_motioncache import AutoencoderViTMagi1, Magi1Pipeline, SamplingConfig

FLOW_SHIFT = 3.0


def export_skyreels(
    folder: Path, model: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKLWan
) -> None:
    """Write a `SkyReelsV2DiffusionForcingPipeline` that plain `from_pretrained(folder)` loads."""
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=tokenizer,
        text_encoder=_full(model["text_encoder"]),
        transformer=_half(model["transformer"]),
        vae=_half(vae),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
        ),
    )
    pipeline.save_pretrained(folder)


def export_magi(
    folder: Path,
    model: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    vae: AutoencoderViTMagi1,
    sampling: SamplingConfig,
) -> None:
    """Write a `Magi1Pipeline` that plain `from_pretrained(folder)` loads, with its sampling options."""
    pipeline = Magi1Pipeline(
        tokenizer=tokenizer,
        text_encoder=_full(model["text_encoder"]),
        transformer=_half(model["transformer"]),
        vae=_half(vae),
        sampling=sampling.to_dict(),
    )
    pipeline.save_pretrained(folder)


def _full(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("cpu").float().eval()


def _half(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    model.register_to_config(_name_or_path="")  # where it was trained concerns nobody
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.to("cpu", torch.float16).contiguous()
    return model
