"""Settings of MAGI-1 runs: the shipped files, what fits together, and checkpoints before they are loaded."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import change_json

from common.errors import UserError
from common.runs import REPOSITORY
from common.settings import CONFIGS
from magi1_motioncache import Magi1Pipeline, SamplingConfig
from magi1_motioncache.folders import Architecture, find_checkpoint, inspect_checkpoint
from magi1_motioncache.generate import Generator, plan_video
from magi1_motioncache.loading import load_pipeline
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.settings import SAMPLING, RunSettings, load_settings
from magi1_motioncache.validate import check_shapes, sampling_options

SHIPPED = sorted(CONFIGS.glob("magi1_*.yaml"))
BASE = SamplingConfig(cfg_number=3, distill=False)
PUBLISHED = {"4.5b_base": "4.5B_base", "4.5b_distill": "4.5B_distill", "24b_distill": "24B_distill"}


def size_of(path: Path) -> str:
    return path.stem.removeprefix("magi1_").rpartition("_")[0]


# -- shipped files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_fit_their_model(path):
    run, used = load_settings(path)
    published = VARIANTS[PUBLISHED[size_of(path)]] if size_of(path) in PUBLISHED else None
    checkpoint = BASE.replace(chunk_width=3) if published is None else published.sampling
    sampling = check_shapes(run, Architecture(4 if published is None else 8, checkpoint, True))
    assert used == path
    assert run.cache.method == ("exact" if path.stem.endswith("exact") else "motioncache")
    if published is not None:
        assert (run.height, run.width) == (published.height, published.width)
        assert sampling == published.sampling, "the file names the published options"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_name_every_setting(path):
    """A reader sees the whole run in one file; options that only base or only distilled models have apart."""
    values = yaml.safe_load(path.read_text())
    left_out = {field.name for field in dataclasses.fields(RunSettings)} - values.keys()
    distilled = values["sampling"]["cfg_number"] == 1
    assert left_out == {"image", "video"} | ({"guidance_scale"} if distilled else set())
    guidance = {"cfg_t_range", "prev_chunk_scales", "text_scales"}
    distillation = {"shortcut_mode", "nearly_clean_threshold", "nearly_clean_scale"}
    assert set(SAMPLING) - values["sampling"].keys() == (guidance if distilled else distillation)


@pytest.mark.parametrize("size", ["tiny", *PUBLISHED])
def test_presets_of_a_model_differ_in_the_cache_alone(size):
    runs = [load_settings(CONFIGS / f"magi1_{size}_{preset}.yaml")[0] for preset in ("exact", "slow", "fast")]
    same = [dataclasses.replace(run, cache=runs[0].cache) for run in runs]
    assert same[0] == same[1] == same[2]
    assert runs[1].cache.threshold < runs[2].cache.threshold


def test_the_published_run():
    run, _ = load_settings(CONFIGS / "magi1_4.5b_distill_slow.yaml")
    assert (run.height, run.width, run.num_frames, run.steps, run.fps, run.seed) == (720, 720, 168, 64, 24, 1234)
    cache = run.cache
    assert (cache.threshold, cache.alpha, cache.warmup_steps, cache.chunk_phase) == (0.0065, 0.6, 5, 20)
    assert (cache.chunk_phase_unit, cache.distance, cache.score) == ("steps", "input", "latent_motion")
    assert (cache.reuse, cache.min_update_share, cache.temporal_vote) == ("velocity", 0.0, False)


def test_flowcache_has_its_own_thresholds():
    slow, fast = (
        load_settings(model="models/magi1-4.5b-distill", preset=f"flowcache-{p}")[0] for p in ("slow", "fast")
    )
    assert (slow.cache.threshold, slow.cache.alpha) == (0.01, 1.0)
    assert (fast.cache.threshold, fast.cache.alpha) == (0.015, 1.0)
    tea, _ = load_settings(model="models/magi1-4.5b-distill", preset="teacache-slow")
    assert (tea.cache.threshold, tea.cache.method) == (0.01, "teacache")


def test_settings_survive_yaml():
    run = RunSettings("m", "p", special_tokens=["duration"], sampling={"noise2clean_kvrange": [2, 1]})
    assert RunSettings.from_dict(yaml.safe_load(yaml.safe_dump(run.to_dict()))) == run


# -- what fits together -----------------------------------------------------------------------------------------------


def test_options_of_the_run_replace_the_checkpoints():
    run = RunSettings("m", "p", steps=8, fps=12, sampling={"window_size": 2}, guidance_scale=4.0)
    sampling = sampling_options(run, BASE)
    assert (sampling.num_steps, sampling.window_size, sampling.fps, sampling.cfg_number) == (8, 2, 12, 3)
    assert sampling.text_scales == (4.0, 4.0, 4.0, 0.0, 0.0)
    assert sampling.noise2clean_kvrange == BASE.noise2clean_kvrange


@pytest.mark.parametrize(("checkpoint", "other"), [(BASE, 1), (SamplingConfig(), 3)], ids=["base", "distilled"])
def test_the_passes_are_the_checkpoints(checkpoint, other):
    own = checkpoint.cfg_number
    with pytest.raises(UserError, match=rf"cfg_number: {other} is not allowed .* or --set sampling.cfg_number={own}$"):
        sampling_options(RunSettings("m", "p", sampling={"cfg_number": other}), checkpoint)


@pytest.mark.parametrize("given", [{}, {"image": "a.png"}, {"video": "b.mp4"}], ids=["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("frames", [48, 96])
def test_the_whole_video_has_the_frames_that_are_asked_for(given, frames):
    plan = plan_video(RunSettings("m", "p", num_frames=frames, **given), BASE)
    assert plan.latent_frames * 4 == frames


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(magi_folder, tmp_path) -> Path:
    """A checkpoint of its own, to break."""
    return Path(shutil.copytree(magi_folder, tmp_path / "checkpoint"))


def test_a_whole_checkpoint_is_accepted(magi_folder):
    found = inspect_checkpoint(find_checkpoint(str(magi_folder)))
    assert found == Architecture(8, SamplingConfig(num_steps=8, chunk_width=2, cfg_number=3, distill=False), False)


def test_other_architectures_are_refused(checkpoint, tiny_pipeline_folder):
    with pytest.raises(UserError, match="its transformer is 'SkyReelsV2Transformer3DModel', not 'Magi1"):
        inspect_checkpoint(tiny_pipeline_folder)
    change_json(checkpoint / "transformer/config.json", in_channels=8)
    with pytest.raises(UserError, match="latents of 8 channels and its vae makes 4"):
        inspect_checkpoint(checkpoint)


def test_a_config_without_a_size_is_refused(checkpoint):
    change_json(checkpoint / "vae/config.json", ddconfig={"patch_size": 8})
    with pytest.raises(UserError, match=r"vae/config.json' has no 'ddconfig.z_chans'; fetch it again"):
        inspect_checkpoint(checkpoint)


def test_special_tokens_of_another_model_are_refused(checkpoint, tmp_path):
    file = tmp_path / "special_tokens.npz"
    tokens = {"caption_token": (1, 8), "logo_token": (1, 8), "other_tokens": (20, 8)}
    np.savez(file, **{name: np.zeros(shape) for name, shape in tokens.items()})
    with pytest.raises(UserError, match="special_tokens has 8 channels and the transformer takes captions of 32"):
        load_pipeline(checkpoint, special_tokens_file=str(file))


def test_half_precision_leaves_what_must_stay_whole(magi_folder):
    pipe = load_pipeline(magi_folder, dtype=torch.bfloat16)
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.transformer.compute_dtype == torch.bfloat16
    assert pipe.transformer.final_linear.linear.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "text", [Magi1Pipeline.__doc__, (REPOSITORY / "README.md").read_text()], ids=["class", "README"]
)
def test_the_documented_way_to_load_is_the_commands(magi_folder, text):
    lines = [line.strip().removeprefix(">>> ") for line in text.splitlines()]
    code = "\n".join(line for line in lines if line.startswith(("dtype = ", "pipe = Magi1Pipeline")))
    code = re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{magi_folder}"', code).replace('.to("cuda")', "")
    names = {"torch": torch, "Magi1Pipeline": Magi1Pipeline}
    exec(code, names)
    assert names["pipe"].vae.dtype == names["pipe"].text_encoder.dtype == torch.float32
    assert names["pipe"].transformer.compute_dtype == torch.bfloat16


# -- the generator ----------------------------------------------------------------------------------------------------


def test_chunks_decoded_on_the_way_are_the_whole_video(magi_folder):
    run = RunSettings(str(magi_folder), "a red circle", height=32, width=32, num_frames=24, steps=4)
    sampling = check_shapes(run, inspect_checkpoint(magi_folder))
    pipe = load_pipeline(magi_folder)
    pipe.set_progress_bar_config(disable=True)
    generator = Generator(pipe, run, sampling)
    generator.encode()
    parts, ticks = [], []
    made = generator.run(lambda: ticks.append(len(parts)), on_frames=parts.append)
    assert [len(part) for part in parts] == [8, 8, 8]
    assert len(ticks) == generator.total_iterations == len(made.iteration_seconds)
    assert sorted(set(ticks)) == [0, 1, 2], "the next iterations run after a chunk is handed out"
    assert made.iteration_seconds == sorted(made.iteration_seconds)
    again = generator.run()
    assert again.frames is None and torch.equal(again.latents, made.latents)
    assert (generator.decode(again.latents) == made.frames).all()
    stopped = generator.run(stop_after=2)
    assert len(stopped.iteration_seconds) == 2
