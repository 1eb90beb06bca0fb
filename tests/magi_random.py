"""Small MAGI-1 pipelines and checkpoints with random weights: real classes, real schedules, results in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import zstandard
from conftest import WORDS, make_tokenizer
from safetensors.torch import save
from transformers import T5Config, T5EncoderModel

from magi1_motioncache import AutoencoderViTMagi1, Magi1Pipeline, Magi1Transformer3DModel, SamplingConfig, SpecialTokens
from magi1_motioncache.presets import VARIANTS

TEXT_WIDTH = 32
# A checkpoint as it is published, but small.
SIZES = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 32,
    "ffn_hidden_size": 96,
    "caption_channels": 32,
    "caption_max_length": 60,
}
PLAIN = replace(VARIANTS["4.5B_distill"], transformer=SIZES)
QUANTISED = replace(VARIANTS["4.5B_distill_quant"], transformer=SIZES)


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


def random_weights() -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint of `SIZES`, bfloat16."""
    torch.manual_seed(0)
    return {k: torch.randn_like(v).bfloat16() for k, v in Magi1Transformer3DModel(**SIZES).state_dict().items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], compressed: bool = False) -> list[Path]:
    """Write tensors as they are published, in two files and their index; the files."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    places, files = {}, []
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        content = save({name: tensors[name].contiguous() for name in part})
        file = folder / (shard + ".zst" if compressed else shard)
        file.write_bytes(zstandard.ZstdCompressor().compress(content) if compressed else content)
        places.update(dict.fromkeys(part, shard))
        files.append(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files
