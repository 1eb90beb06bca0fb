"""A small MAGI-1 pipeline with random weights: real classes, real schedules, results in seconds."""

from __future__ import annotations

import torch
from conftest import WORDS, make_tokenizer
from transformers import T5Config, T5EncoderModel

from magi1_motioncache import AutoencoderViTMagi1, Magi1Pipeline, Magi1Transformer3DModel, SamplingConfig, SpecialTokens

TEXT_WIDTH = 32


def make_magi_pipeline(tokens: bool = False, layers: int = 2, **sampling) -> Magi1Pipeline:
    """A float32 base model (three passes) with chunks of 2 latent frames, 8 video frames.

    Args:
        tokens: with special tokens.
        layers: of the transformer.
        sampling: options that differ.
    """
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    transformer = Magi1Transformer3DModel(
        hidden_size=64,
        num_layers=layers,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=32,
        ffn_hidden_size=128,
        in_channels=4,
        out_channels=4,
        caption_channels=TEXT_WIDTH,
        caption_max_length=64,
    )
    torch.nn.init.normal_(transformer.y_embedder.null_caption_embedding)
    sizes = {"video_size": 32, "video_length": 8, "patch_size": 8, "patch_length": 4}
    vae = AutoencoderViTMagi1({**sizes, "z_chans": 4, "embed_dim": 256, "depth": 1, "num_heads": 4})
    special = SpecialTokens(TEXT_WIDTH) if tokens else None
    if special is not None:
        torch.nn.init.normal_(special.other_tokens)
    options = {"num_steps": 8, "chunk_width": 2, "cfg_number": 3, "distill": False, **sampling}
    return Magi1Pipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        special_tokens=special,
        sampling=SamplingConfig(**options).to_dict(),
    )
