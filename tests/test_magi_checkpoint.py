"""Published checkpoint files: shards, compression, quantisation, faults, and the way to one pipeline folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import change_json
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from common.errors import UserError
from common.settings import CONFIGS
from magi1_motioncache import cli, convert
from magi1_motioncache.checkpoint import load_transformer, read_tensors, weights_folder
from magi1_motioncache.folders import inspect_checkpoint
from magi1_motioncache.fp8 import dequantise
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.transformer import Magi1Transformer3DModel
from magi1_motioncache.vae import AutoencoderViTMagi1
from tests.magi_cases import FOLDER, parameters, tensors

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


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {k: torch.randn_like(v).bfloat16() for k, v in Magi1Transformer3DModel(**SIZES).state_dict().items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], compressed: bool = False) -> list[Path]:
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


@pytest.mark.parametrize("compressed", [False, True])
def test_shards(tmp_path, weights, compressed):
    write_shards(tmp_path / PLAIN.weights, weights, compressed)
    model = load_transformer(tmp_path, PLAIN)
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), weights[name].float()), name
    assert model.x_embedder.weight.dtype == torch.float32
    assert model.compute_dtype == torch.bfloat16
    assert model.videodit_blocks.layers[0].self_attention.q_layernorm.weight.dtype == torch.float32
    assert model.videodit_blocks.layers[0].self_attention.q_layernorm_xattn.weight.dtype == torch.bfloat16


def test_single_file(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    assert load_transformer(tmp_path, PLAIN, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_off_shard(tmp_path, weights, compressed):
    file = write_shards(tmp_path / "w", weights, compressed)[1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="00002-of-00002.*damaged or cut off"):
        read_tensors(tmp_path / "w")


def test_missing_files(tmp_path, weights):
    with pytest.raises(UserError, match="give the checkpoint's folder"):
        weights_folder(tmp_path, PLAIN)
    write_shards(tmp_path / "w", weights)[0].unlink()
    with pytest.raises(UserError, match="00001-of-00002.safetensors is missing"):
        read_tensors(tmp_path / "w")
    for text, message in (("{", "it is damaged"), ("{}", "has no 'weight_map'")):
        (tmp_path / "w" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / "w")


def test_tensor_not_in_its_shard(tmp_path, weights):
    write_shards(tmp_path / "w", weights)
    index = tmp_path / "w" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match="lacks lost.weight"):
        read_tensors(tmp_path / "w")


def test_every_fault_is_named(tmp_path, weights):
    wrong = dict(weights)
    del wrong["rope.bands"], wrong["final_linear.linear.weight"]
    wrong["extra.one"] = wrong["extra.two"] = torch.zeros(2)
    wrong["x_embedder.weight"] = torch.zeros(1, 2)
    save_file({name: value.clone() for name, value in wrong.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_transformer(tmp_path, PLAIN)
    for part in (
        "missing rope.bands (4,)",
        "missing final_linear.linear.weight",
        "surplus extra.one (2,)",
        "surplus extra.two",
        "x_embedder.weight is (1, 2) and should be (64, 16, 1, 2, 2)",
    ):
        assert part in str(error.value)


def quantised(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published fp8 form of all layers but the first and last."""
    stored = dict(weights)
    layer = "videodit_blocks.layers.1."
    attention, mlp = f"{layer}self_attention.", f"{layer}mlp."
    for name in (*(f"{attention}linear_qkv.{part}" for part in ("q", "qx", "k", "v")), f"{mlp}linear_fc1"):
        weight = stored.pop(f"{name}.weight").float()
        scale = weight.abs().max() / 448
        stored[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn).unsqueeze(0)
        stored[f"{name}.weight_scale"] = scale.view(1)
        stored[f"{name}.input_scale"] = torch.full((weight.shape[1],), 0.37)
    for name in (f"{attention}linear_proj", f"{mlp}linear_fc2"):
        weight = stored.pop(f"{name}.weight").float()
        smooth = torch.rand(1, weight.shape[1]) + 0.5
        smoothed = weight * smooth / 0.7
        scale = smoothed.abs().max() / 448
        stored[f"{name}.weight"] = (smoothed / scale).to(torch.float8_e4m3fn).unsqueeze(0)
        stored[f"{name}.weight_scale"] = scale.view(1)
        stored[f"{name}.input_scale"] = torch.tensor([0.7])
        stored[f"{name}.smooth_scale"] = smooth
    return stored


def test_quantised_weights(tmp_path, weights):
    save_file(quantised(weights), (tmp_path / "model.safetensors"))
    model = load_transformer(tmp_path, QUANTISED)
    for name, value in model.state_dict().items():
        reference = weights[name].float()
        # e4m3 keeps three bits after the leading one: half a step is a sixteenth of the value.
        assert torch.allclose(value.float(), reference, rtol=0.07, atol=0.01 * float(reference.abs().max())), name


def test_quantised_faults(weights):
    stored = quantised(weights)
    name = "videodit_blocks.layers.1.mlp.linear_fc1"
    with pytest.raises(UserError, match="linear_fc1 but not its weight"):
        dequantise({key: value for key, value in stored.items() if key != f"{name}.weight"})
    with pytest.raises(UserError, match="lacks .*linear_fc1.input_scale"):
        dequantise({key: value for key, value in stored.items() if key != f"{name}.input_scale"})
    with pytest.raises(UserError, match="differs between channels"):
        dequantise(stored | {f"{name}.input_scale": torch.arange(64.0)})


@pytest.fixture
def published(tmp_path, weights) -> Path:
    """The layout of the hub, tiny."""
    root = tmp_path / "ckpt"
    write_shards(root / "magi" / "4.5B_distill" / PLAIN.weights, weights)
    sizes = parameters("weights_vae")["ddconfig"] | {"z_chans": 16, "patch_size": 8, "video_size": 32, "embed_dim": 256}
    AutoencoderViTMagi1(sizes).save_pretrained(root / "vae")
    config = json.loads((root / "vae" / "config.json").read_text())
    (root / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "ViTVAE"}))
    text = root / "t5" / "t5-v1_1-xxl"
    encoder = T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(encoder).save_pretrained(text)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "lake": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(text)
    np.savez(
        tmp_path / "special_tokens.npz", **{k: v.float().numpy() for k, v in special_tokens_of_the_tiny_model().items()}
    )
    return root


def special_tokens_of_the_tiny_model() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "special_tokens_tiny.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def test_published_folder_to_pipeline_folder(tmp_path, published, weights, monkeypatch):
    monkeypatch.setitem(VARIANTS, "4.5B_distill", PLAIN)
    output = tmp_path / "magi1"
    arguments = [str(published), "4.5B_distill", str(output)]
    convert.main([*arguments, "--special-tokens", str(tmp_path / "special_tokens.npz")])
    pipeline = Magi1Pipeline.from_pretrained(output, dtype=torch.bfloat16)
    assert pipeline.sampling == PLAIN.sampling
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value.float(), weights[name].float()), name
    assert pipeline.transformer.t_embedder.mlp[0].weight.dtype == torch.float32
    assert pipeline.transformer.compute_dtype == torch.bfloat16
    stored = special_tokens_of_the_tiny_model()["other_tokens"]
    assert torch.equal(pipeline.special_tokens.other_tokens, stored.half().float())


def test_published_folder_faults(tmp_path, published, capsys):
    with pytest.raises(UserError, match="24B_base is missing"):
        convert.load_published(published, VARIANTS["24B_base"], "24B_base")
    with pytest.raises(UserError, match="special_tokens.npz is missing|no.npz is missing"):
        convert.load_special_tokens(tmp_path / "no.npz")
    assert convert.main([str(published), "9B", str(tmp_path / "out")]) == 2
    assert "unknown MAGI-1 variant '9B'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert convert.main([str(published), "4.5B_distill", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    text = published / "t5" / "t5-v1_1-xxl"
    change_json(text / "config.json", num_layers=2)
    assert convert.main([str(published), "4.5B_distill", str(tmp_path / "out")]) == 2
    assert re.search(r"error: .*t5-v1_1-xxl lacks encoder.block.1.*; fetch it again\n$", capsys.readouterr().err)
    (text / "tokenizer.json").write_text("{")
    assert convert.main([str(published), "4.5B_distill", str(tmp_path / "out")]) == 2
    assert re.search(r"error: .*t5-v1_1-xxl' cannot be loaded .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("fault", ["nothing", "cut off", "an array", "flat", "few rows"])
def test_damaged_special_tokens(published, tmp_path, fault):
    """The published file is whole, and anything else is told in one line."""
    file = tmp_path / "special_tokens.npz"
    assert convert.load_special_tokens(file).caption_token.shape == (1, 32)
    values = special_tokens_of_the_tiny_model()
    if fault == "an array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif fault in ("flat", "few rows"):
        change = (
            {"caption_token": values["caption_token"][0]} if fault == "flat" else {"other_tokens": torch.zeros(5, 32)}
        )
        np.savez(file, **{name: value.numpy() for name, value in (values | change).items()})
    else:
        file.write_bytes(file.read_bytes()[: 1000 if fault == "cut off" else 0])
    with pytest.raises(UserError, match="does not hold the special tokens"):
        convert.load_special_tokens(file)


def test_compressed_shards_are_looked_for(published, weights):
    folder = published / "magi" / "4.5B_distill"
    shutil.rmtree(folder / PLAIN.weights)
    first, _ = write_shards(folder / PLAIN.weights, weights, compressed=True)
    inspect_checkpoint(folder)
    first.unlink()
    with pytest.raises(UserError, match="00001-of-00002.safetensors' cannot be read: No such file"):
        inspect_checkpoint(folder)


def test_the_command_opens_a_published_folder(tmp_path, published, monkeypatch):
    monkeypatch.setitem(VARIANTS, "4.5B_distill", PLAIN)
    size = ["--height", "32", "--width", "32", "--num-frames", "24", "--steps", "4", "--no-compare"]
    arguments = ["--config", str(CONFIGS / "magi1_4.5b_distill_slow.yaml"), *size, "--prompt", "lake"]
    model = ["--model", str(published / "magi" / "4.5B_distill")]
    assert cli.main([*arguments, *model]) == 2, "the config asks for special tokens and there are none"
    (tmp_path / "special_tokens.npz").rename(published / "special_tokens.npz")
    assert cli.main([*arguments, *model, "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mode"] == "t2v" and summary["flops"] > 0
    (shard, *_) = sorted((published / "magi" / "4.5B_distill" / PLAIN.weights).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        inspect_checkpoint(published / "magi" / "4.5B_distill")


def test_published_autoencoder_config_loads_without_complaint(published, caplog):
    with caplog.at_level(logging.WARNING):
        vae = AutoencoderViTMagi1.from_pretrained(published / "vae")
    assert vae.config.ddconfig["z_chans"] == 16


def test_reference_weights_have_the_published_names():
    recorded = parameters("weights_A")["names_shapes"]
    assert {name: list(value.shape) for name, value in tensors("weights_A").items()} == recorded
