"""Small SkyReels-V2 pipelines with random weights: real classes, real schedules, results in a second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

TEXT_TOKENS = 8
PIPELINES = {
    "t2v": SkyReelsV2DiffusionForcingPipeline,
    "i2v": SkyReelsV2DiffusionForcingImageToVideoPipeline,
    "v2v": SkyReelsV2DiffusionForcingVideoToVideoPipeline,
}
# Three windows of 8 latent frames, 4 of which overlap: 16 latent frames.
LONG = {"num_frames": 61, "base_num_frames": 29, "overlap_history": 13}


def random_pipeline(
    kind: str = "t2v", block: int = 2, heads: int = 2, head_dim: int = 12, layers: int = 3, fps: bool = False
) -> tuple[object, Callable[..., Tensor]]:
    """A pipeline and a function that runs it to its final latents `[batch, channels, frames, height, width]`.

    The function draws the same noise at each call and passes its keyword arguments on to the pipeline.
    """
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=layers,
        rope_max_seq_len=128,
        inject_sample_info=fps,
        num_frame_per_block=block,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    pipe = PIPELINES[kind](tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.randn(2, 1, TEXT_TOKENS, 16).unbind(0)
    given = {
        "t2v": {},
        "i2v": {"image": torch.rand(1, 3, 32, 48)},
        "v2v": {"video": torch.rand(1, 13, 3, 32, 48)},
    }[kind]

    def call(**options) -> Tensor:
        torch.manual_seed(5)  # the noise on given frames comes from the global generator
        settings = {
            **given,
            "height": 32,
            "width": 48,
            "num_frames": 29,
            "num_inference_steps": 8,
            "ar_step": 2,
            "causal_block_size": block,
            "guidance_scale": 4.0,
            "prompt_embeds": prompt,
            "negative_prompt_embeds": negative,
            **options,
        }
        return pipe(
            prompt=None,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
            **settings,
        ).frames

    return pipe, call
