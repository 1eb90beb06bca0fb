"""Published checkpoint files: shards, compression, quantisation, and faults in them."""

from __future__ import annotations

import json

import pytest
import torch
from magi_random import PLAIN, QUANTISED, random_weights, write_shards
from safetensors.torch import save_file

from common.errors import UserError
from magi1_motioncache.checkpoint import load_transformer, read_tensors, weights_folder
from magi1_motioncache.fp8 import dequantise
from tests.magi_cases import parameters, tensors


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


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


def test_faults_are_named(tmp_path, weights):
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


def test_another_architecture_is_one_short_line(tmp_path, weights):
    """Every tensor is wrong there: the first ones tell it."""
    save_file({f"other.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"(missing [^;]*; ){{5}}and {2 * len(weights) - 5} more; check") as error:
        load_transformer(tmp_path, PLAIN)
    assert len(str(error.value)) < 600


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


def test_an_input_scale_per_channel(weights):
    """The original divides each channel by its own scale and multiplies the product by the first of them."""
    name = "videodit_blocks.layers.1.mlp.linear_fc1"
    scales = torch.linspace(0.5, 2, 64)
    stored = quantised(weights) | {f"{name}.input_scale": scales}
    rows = torch.randn(5, 64)
    product = (rows / scales) @ stored[f"{name}.weight"].float().squeeze(0).T
    expected = product * stored[f"{name}.weight_scale"] * scales[0]
    made = dequantise(stored, torch.float32)[f"{name}.weight"]
    torch.testing.assert_close(rows @ made.T, expected, rtol=1e-4, atol=1e-4)


def test_reference_weights_have_the_published_names():
    recorded = parameters("weights_A")["names_shapes"]
    assert {name: list(value.shape) for name, value in tensors("weights_A").items()} == recorded
