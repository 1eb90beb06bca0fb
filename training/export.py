"""Writing a trained model as a diffusers pipeline folder."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler
from torch import nn
from transformers import PreTrainedTokenizerFast

FLOW_SHIFT = 3.0


def export_skyreels(
    folder: Path, model: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKLWan
) -> None:
    """Write a `SkyReelsV2DiffusionForcingPipeline` that plain `from_pretrained(folder)` loads.

    Weights are stored in float16, except the text encoder's: transformers loads weights in the type they are stored in,
    and it is too small to matter.
    """
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=tokenizer,
        text_encoder=copy.deepcopy(model["text_encoder"]).float().eval(),
        transformer=_half(model["transformer"]),
        vae=_half(vae),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
        ),
    )
    pipeline.save_pretrained(folder)


def _half(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.to("cpu", torch.float16).contiguous()
    return model
