"""Checkpoints: checked by their small files before they are loaded, and whole once they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import change_json
from safetensors.torch import load_file, save_file

from common.errors import UserError
from magi1_motioncache import folders, loading
from skyreels_v2_motioncache.checkpoint import Architecture, find_checkpoint, inspect_checkpoint
from skyreels_v2_motioncache.loading import load_pipeline
from skyreels_v2_motioncache.scheduler import OriginalSigmasUniPC


class Family(NamedTuple):
    """A model's checkpoint of its own, to break, and what its package does with one.

    Attributes:
        folder: the checkpoint.
        inspect: checks it by its small files.
        load: loads it.
        inner: the transformer's setting for the width of its MLP.
    """

    folder: Path
    inspect: Callable[[Path], object]
    load: Callable[[Path], object]
    inner: str


@pytest.fixture(params=["skyreels", "magi"])
def family(request, tmp_path) -> Family:
    if request.param == "skyreels":
        source, rest = "tiny_pipeline_folder", (inspect_checkpoint, load_pipeline, "ffn_dim")
    else:
        source, rest = "magi_folder", (folders.inspect_checkpoint, loading.load_pipeline, "ffn_hidden_size")
    return Family(Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "checkpoint")), *rest)


@pytest.fixture
def checkpoint(tiny_pipeline_folder, tmp_path) -> Path:
    """A SkyReels-V2 checkpoint of its own, to break."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "checkpoint"))


# -- of both models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_missing_parts_are_named(family, part):
    shutil.rmtree(family.folder / part)
    with pytest.raises(UserError, match=f"has no '{part}'"):
        family.inspect(family.folder)


def test_missing_weights_are_named(family):
    for file in (family.folder / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no weights: no .*safetensors in 'vae'"):
        family.inspect(family.folder)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_weights_are_found_before_loading(family, left):
    (file,) = (family.folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"\.safetensors' is truncated: \d+ bytes, its header .*fetch it again"):
        family.inspect(family.folder)


def test_a_missing_shard_is_found(family):
    index = family.folder / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors' cannot be read: No such file"):
        family.inspect(family.folder)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(UserError, match="index.json' has no 'weight_map'; fetch it again"):
        family.inspect(family.folder)


def test_a_tokenizer_without_words_is_found(family):
    """The library would make an empty one of it, for which every prompt is the same."""
    (family.folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer' has no tokenizer.json or spiece.model; fetch it again"):
        family.inspect(family.folder)


@pytest.mark.parametrize("text", ['{"_class_name": ', "[]"])
def test_damaged_json_is_refused(family, text):
    (family.folder / "vae/config.json").write_text(text)
    with pytest.raises(UserError, match=r"vae/config.json' cannot be read: it is damaged"):
        family.inspect(family.folder)


def test_weights_that_do_not_fit_their_config_are_one_line(family):
    change_json(family.folder / "transformer/config.json", **{family.inner: 64})
    with pytest.raises(UserError, match=r"cannot be loaded \(\w+: .*fetch it again") as error:
        family.load(family.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_tensors_that_no_file_has_are_named(family, part):
    """Neither library would refuse them: one leaves such tensors empty, the other fills in random numbers."""
    change_json(family.folder / part / "config.json", num_layers=3)
    with pytest.raises(UserError, match=rf"'\S+\.[12]\.\S+' is in no file of '{part}'; fetch it again"):
        family.load(family.folder)


def test_layers_that_the_config_leaves_out_are_named(family):
    """The library would load a shorter model."""
    change_json(family.folder / "transformer/config.json", num_layers=1)
    with pytest.raises(
        UserError, match=r"'transformer' has '\S+\.1\.\S+', for which the configured model has no place"
    ):
        family.load(family.folder)


def test_parts_of_a_larger_model_may_stand_beside(family):
    """As a whole T5 of which the encoder is used."""
    (file,) = (family.folder / "text_encoder").glob("*.safetensors")
    save_file({**load_file(file), "decoder.final_layer_norm.weight": torch.ones(2)}, file, {"format": "pt"})
    family.load(family.folder)


# -- of SkyReels-V2 ---------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_is_accepted(tiny_pipeline_folder):
    assert inspect_checkpoint(find_checkpoint(str(tiny_pipeline_folder))) == Architecture(4, 4, (2, 2), 32)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "assets/no-such-model", "a/b/c", "word"])
def test_what_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(UserError, match="is neither a folder nor the name of a hub repository"):
        find_checkpoint(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no\nroute to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'Some/Model' .*ConnectionError: no route to host\); check the name"):
        find_checkpoint("Some/Model")


def test_a_missing_scheduler_is_named(checkpoint):
    shutil.rmtree(checkpoint / "scheduler")
    with pytest.raises(UserError, match="has no 'scheduler'"):
        inspect_checkpoint(checkpoint)


def test_other_architectures_are_refused(checkpoint):
    change_json(checkpoint / "transformer/config.json", _class_name="WanTransformer3DModel")
    with pytest.raises(UserError, match=r"another architecture: its transformer is 'WanTransformer3DModel'"):
        inspect_checkpoint(checkpoint)


def test_pipelines_that_denoise_all_frames_at_once_are_refused(checkpoint):
    change_json(checkpoint / "model_index.json", _class_name="SkyReelsV2Pipeline")
    with pytest.raises(
        UserError, match=r"is of a SkyReelsV2Pipeline, which .*diffusion-forcing \(DF\) checkpoint such"
    ):
        inspect_checkpoint(checkpoint)


def test_the_layout_of_the_original_code_is_told_from_that_of_diffusers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model_index.json.* ends in -Diffusers, such as Skywork/\S+-Diffusers$"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("part", "key"),
    [("transformer", "in_channels"), ("transformer", "patch_size"), ("vae", "z_dim"), ("vae", "temperal_downsample")],
)
def test_a_config_without_a_size_is_refused(checkpoint, part, key):
    path = checkpoint / part / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(UserError, match=rf"{part}/config.json' has no '{key}'; fetch it again"):
        inspect_checkpoint(checkpoint)


def test_an_image_conditioned_transformer_is_refused(checkpoint):
    change_json(checkpoint / "transformer/config.json", in_channels=20)
    with pytest.raises(UserError, match="an image-to-video model with 20 input channels"):
        inspect_checkpoint(checkpoint)


def test_half_precision_leaves_what_must_stay_whole(tiny_pipeline_folder):
    pipe = load_pipeline(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    transformer = pipe.transformer
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32


def test_scheduler_by_settings(tiny_pipeline_folder):
    stock = load_pipeline(tiny_pipeline_folder, sigmas="diffusers").scheduler
    assert type(stock).__name__ == "UniPCMultistepScheduler" and stock.config.flow_shift == 3.0
    original = load_pipeline(tiny_pipeline_folder, shift=8.0).scheduler
    assert isinstance(original, OriginalSigmasUniPC) and original.config.flow_shift == 8.0
