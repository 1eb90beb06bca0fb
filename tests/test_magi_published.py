"""The published folders: what is found wrong before they are loaded, and the way from them to one pipeline folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_json
from magi_random import PLAIN, random_weights, write_shards
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from common.errors import UserError
from common.settings import CONFIGS
from magi1_motioncache import cli, convert
from magi1_motioncache.folders import Architecture, inspect_checkpoint
from magi1_motioncache.loading import load_pipeline
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.settings import load_settings
from magi1_motioncache.vae import AutoencoderViTMagi1
from magi1_motioncache.validate import check_config_file
from tests.magi_cases import FOLDER, parameters

NAME = "4.5B_distill"
TEXT = "t5/t5-v1_1-xxl"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture
def published(tmp_path, weights, monkeypatch) -> Path:
    """The layout of the hub, tiny."""
    monkeypatch.setitem(VARIANTS, NAME, PLAIN)
    root = tmp_path / "ckpt"
    write_shards(root / "magi" / NAME / PLAIN.weights, weights)
    sizes = parameters("weights_vae")["ddconfig"] | {"z_chans": 16, "patch_size": 8, "video_size": 32, "embed_dim": 256}
    AutoencoderViTMagi1(sizes).save_pretrained(root / "vae")
    change_json(root / "vae" / "config.json", _class_name="ViTVAE")
    encoder = T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(encoder).save_pretrained(root / TEXT)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "lake": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(root / TEXT)
    tokens = {name: value.float().numpy() for name, value in special_tokens_of_the_tiny_model().items()}
    np.savez(tmp_path / "special_tokens.npz", **tokens)
    return root


def special_tokens_of_the_tiny_model() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "special_tokens_tiny.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def pickle_text_encoder(folder: Path) -> Path:
    """Store a text encoder as the published one is: two files of `torch.save` and their index; the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / file


# -- to one pipeline folder -------------------------------------------------------------------------------------------


def test_published_folder_to_pipeline_folder(tmp_path, published, weights):
    output = tmp_path / "magi1"
    arguments = [str(published), NAME, str(output)]
    assert convert.main([*arguments, "--special-tokens", str(tmp_path / "special_tokens.npz")]) == 0
    pipeline = Magi1Pipeline.from_pretrained(output, dtype=torch.bfloat16)
    assert pipeline.sampling == PLAIN.sampling
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value.float(), weights[name].float()), name
    assert pipeline.transformer.t_embedder.mlp[0].weight.dtype == torch.float32
    assert pipeline.transformer.compute_dtype == torch.bfloat16
    stored = special_tokens_of_the_tiny_model()["other_tokens"]
    assert torch.equal(pipeline.special_tokens.other_tokens, stored.half().float())
    assert inspect_checkpoint(output).variant == NAME


def test_published_folder_faults(tmp_path, published, capsys):
    def refused(*arguments: str) -> str:
        assert convert.main([str(published), *arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]  # others are progress of the libraries
        assert line.startswith("error: ")
        assert not (tmp_path / "out").exists(), "nothing is left behind"
        return line

    output = str(tmp_path / "out")
    with pytest.raises(UserError, match="24B_base' is missing"):
        convert.load_published(published, VARIANTS["24B_base"], "24B_base")
    with pytest.raises(UserError, match="special_tokens.npz is missing|no.npz is missing"):
        convert.load_special_tokens(tmp_path / "no.npz")
    assert "unknown MAGI-1 variant '9B'" in refused("9B", output)
    (tmp_path / "file").touch()
    assert re.search("cannot be written .*; choose another DIR", refused(NAME, str(tmp_path / "file")))
    text = published / TEXT
    change_json(text / "config.json", num_layers=2)
    assert re.search(r"t5-v1_1-xxl lacks encoder.block.1.*; fetch it again$", refused(NAME, output))
    (text / "tokenizer.json").write_text("{")
    assert re.search(r"t5-v1_1-xxl' cannot be loaded ", refused(NAME, output))


@pytest.mark.parametrize("fault", ["shard", "cut shard", "vae", "text", "cut text", "pointer", "config", "tokenizer"])
def test_faults_of_files_are_found_before_anything_is_loaded(tmp_path, published, capsys, monkeypatch, fault):
    """By the command that converts, and the same by the one that opens the published folders as they are."""
    monkeypatch.setattr(convert, "load_transformer", lambda *_: pytest.fail("it was loaded"))
    shard = sorted((published / "magi" / NAME / PLAIN.weights).glob("*.safetensors"))[1]
    last = pickle_text_encoder(published / TEXT)
    inspect_checkpoint(published / "magi" / NAME)
    if fault in ("cut shard", "cut text"):
        file = shard if fault == "cut shard" else last
        file.write_bytes(file.read_bytes()[:-100])
        message = f"{file.name}' is truncated: "
    elif fault == "pointer":
        last.write_text("version https://git-lfs.github.com/spec/v1\n")
        message = "00002-of-00002.bin' is truncated: 43 bytes, no archive; fetch it again"
    elif fault == "tokenizer":
        (published / TEXT / "tokenizer.json").unlink()
        message = "t5-v1_1-xxl' has no tokenizer.json or spiece.model; fetch it again"
    else:
        parts = {"shard": shard, "vae": published / "vae/config.json", "text": last}
        file = parts.get(fault, published / TEXT / "config.json")
        file.unlink()
        message = f"{file.name}' " + ("is missing" if file.suffix == ".json" else "cannot be read: No such file")
    with pytest.raises(UserError, match=re.escape(message)):
        inspect_checkpoint(published / "magi" / NAME)
    assert convert.main([str(published), NAME, str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_bare_pickle_is_taken_as_it_is(published):
    """Of the format before PyTorch 1.6 nothing tells the length."""
    last = pickle_text_encoder(published / TEXT)
    torch.save(torch.load(last), last, _use_new_zipfile_serialization=False)
    inspect_checkpoint(published / "magi" / NAME)


@pytest.mark.parametrize("fault", ["Ctrl-C", "full disk"])
def test_a_folder_that_is_not_whole_is_named(tmp_path, published, capsys, monkeypatch, fault):
    output = tmp_path / "out"

    def save(self: Magi1Pipeline, folder: Path) -> None:
        (folder / "transformer").mkdir()
        raise KeyboardInterrupt if fault == "Ctrl-C" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Magi1Pipeline, "save_pretrained", save)
    code = convert.main([str(published), NAME, str(output)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"'{output}' is incomplete: convert again, or delete it")
    assert code == (130 if fault == "Ctrl-C" else 2)
    assert fault == "Ctrl-C" or "No space left on device" in line


def test_an_interruption_before_writing_leaves_nothing(tmp_path, published, capsys, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "load_transformer", stop)
    assert convert.main([str(published), NAME, str(tmp_path / "out")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "out").exists()


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


# -- opened as they are -----------------------------------------------------------------------------------------------


def test_compressed_shards_are_looked_for(published, weights):
    folder = published / "magi" / NAME
    shutil.rmtree(folder / PLAIN.weights)
    first, _ = write_shards(folder / PLAIN.weights, weights, compressed=True)
    inspect_checkpoint(folder)
    first.unlink()
    with pytest.raises(UserError, match="00001-of-00002.safetensors' cannot be read: No such file"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("way", ["tensors", "variant", "alias"])
def test_a_variants_folder_may_be_elsewhere(tmp_path, published, weights, way):
    """Its tensors may lie in it directly, it may be a link, or a link may lead to it."""
    folder = published / "magi" / NAME
    if way == "tensors":
        for file in (folder / PLAIN.weights).iterdir():
            file.rename(folder / file.name)
    elif way == "variant":
        folder.symlink_to(folder.rename(tmp_path / "big weights"))
    else:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    assert inspect_checkpoint(folder) == Architecture(8, PLAIN.sampling, False, NAME)
    transformer = load_pipeline(folder).transformer
    assert torch.equal(transformer.x_embedder.weight, weights["x_embedder.weight"].float())


def test_half_precision_files_are_opened_in_single(published):
    for file in (published / TEXT / "model.safetensors", published / "vae/diffusion_pytorch_model.safetensors"):
        halves = {name: value.bfloat16() for name, value in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    change_json(published / TEXT / "config.json", dtype="bfloat16")
    pipe = load_pipeline(published / "magi" / NAME, torch.bfloat16)
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert pipe.transformer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("place", [".", "magi", f"magi/{NAME}/{PLAIN.weights}"])
def test_a_folder_beside_the_right_one_is_told_it(published, place):
    with pytest.raises(UserError, match=f"is not a variant's folder; give '{published / 'magi' / NAME}'$"):
        inspect_checkpoint(published / place)


def test_a_folder_in_no_layout_is_told_which_there_are(published):
    with pytest.raises(UserError, match="give one that .*convert wrote, or a published variant's folder such as ckpt"):
        inspect_checkpoint(published / "vae")


def test_the_command_opens_a_published_folder(tmp_path, published):
    size = ["--height", "32", "--width", "32", "--num-frames", "24", "--steps", "4", "--no-compare"]
    arguments = [*size, "--prompt", "lake", "--model", str(published / "magi" / NAME)]
    assert cli.main(arguments) == 2, "the config asks for special tokens and there are none"
    (tmp_path / "special_tokens.npz").rename(published / "special_tokens.npz")
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config_file"] == str(CONFIGS / "magi1_4.5b_distill_slow.yaml"), "by the folder's name"
    assert summary["mode"] == "t2v" and summary["flops"] > 0
    (shard, *_) = sorted((published / "magi" / NAME / PLAIN.weights).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        inspect_checkpoint(published / "magi" / NAME)


def test_the_tiny_settings_are_not_used_for_a_published_model(tmp_path, published, capsys):
    """They are the default for a name that no file is for; the model is told by its sizes."""
    assert convert.main([str(published), NAME, str(tmp_path / "mine")]) == 0
    assert cli.main(["--model", str(tmp_path / "mine"), "--output", str(tmp_path / "out")]) == 2
    message = f"'magi1_tiny_slow.yaml' is the tiny checkpoint's, and this model is MAGI-1 {NAME}; give --config configs"
    assert f"{message}/magi1_4.5b_distill_slow.yaml\n" in capsys.readouterr().err
    _, config = load_settings(model="ckpt/magi/24B_base")
    with pytest.raises(UserError, match="give --config configs/magi1_4.5b_base_slow.yaml"):
        check_config_file(config, Architecture(8, VARIANTS["24B_base"].sampling, True, "24B_base"))


def test_a_variants_own_config_is_taken():
    for name in ("4.5B_base", "4.5B_distill", "24B_distill"):
        run, config = load_settings(model=f"ckpt/magi/{name}", preset="fast")
        assert config.name == f"magi1_{name.lower()}_fast.yaml" and run.model == f"ckpt/magi/{name}"


def test_published_autoencoder_config_loads_without_complaint(published, caplog):
    with caplog.at_level(logging.WARNING):
        vae = AutoencoderViTMagi1.from_pretrained(published / "vae")
    assert vae.config.ddconfig["z_chans"] == 16
