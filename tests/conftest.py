"""A random SkyReels-V2 pipeline, small enough to make and run in seconds."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from common.cache import Engine, Staging
from common.runs import REPOSITORY

# Models this small gain nothing from more threads, and test processes run side by side.
torch.set_num_threads(1)

WORDS = ["a", "red", "blue", "circle", "star", "moving", "left", "right", "over", "static", "grey", "background"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends each text with `</s>`, as T5's does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_tiny_pipeline(seed: int = 0, **transformer_changes) -> SkyReelsV2DiffusionForcingPipeline:
    """A float32 pipeline of the real classes with random weights; the VAE compresses 4x in time and 4x4 in space."""
    torch.manual_seed(seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0)
    )
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 64,
        "num_frame_per_block": 3,
    }
    transformer = SkyReelsV2Transformer3DModel(**{**sizes, **transformer_changes})
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return SkyReelsV2DiffusionForcingPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
    )


def change_json(path: Path, **changes) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights, as `save_pretrained` writes it. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-random"
    make_tiny_pipeline().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def magi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MAGI-1 checkpoint folder with random weights. Copy it before changing anything."""
    from magi_random import make_magi_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / "magi-random"
    make_magi_pipeline().save_pretrained(str(folder))
    return folder


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Staging]:
    """Main memory is elsewhere even for a model on the CPU; what `state_device` "cpu" makes of that."""
    made = []

    def new_staging(engine: Engine, device: torch.device) -> Staging | None:
        if engine.config.state_device == "model":
            return None
        made.append(Staging(device))
        return made[-1]

    monkeypatch.setattr(Engine, "new_staging", new_staging)
    return made


@pytest.fixture(scope="session")
def documents() -> ModuleType:
    """The script that writes tables into documents, as a module."""
    spec = importlib.util.spec_from_file_location("update_tables", REPOSITORY / "scripts/update_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
