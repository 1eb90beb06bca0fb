"""Settings of SkyReels-V2: the shipped files, what wins over what, and which sizes and frame counts fit a model."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
import yaml

from common.checks import check_range
from common.errors import UserError
from common.runs import REPOSITORY
from common.settings import CONFIGS, LARGEST_SEED, method_name
from skyreels_v2_motioncache.checkpoint import Architecture
from skyreels_v2_motioncache.polynomial import POLYNOMIALS
from skyreels_v2_motioncache.settings import RunSettings, load_settings
from skyreels_v2_motioncache.validate import TINY_WIDTH, check_config_file, check_given_video, check_shapes
from skyreels_v2_motioncache.windows import Window

REAL = Architecture(temporal_factor=4, spatial_factor=8, patch=(2, 2), width=1536)
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SKYREELS = [path for path in SHIPPED if path.name.startswith("skyreels")]

# As TeaCache published it.
POLYNOMIAL_14B = (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1)


def settings(**changes) -> RunSettings:
    """The paper's run, with changes."""
    paper = {"model": "m", "prompt": "p", "num_frames": 177, "overlap_history": 17, "addnoise_condition": 20}
    return RunSettings(**{**paper, **changes})


# -- shipped files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SKYREELS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_fit_their_model(path):
    loaded, used = load_settings(path)
    factor = 4 if "tiny" in path.name else 8
    check_shapes(loaded, Architecture(4, factor, (2, 2), 192))
    assert used == path
    assert loaded.cache.method == ("exact" if path.stem.endswith("exact") else "motioncache")


@pytest.mark.parametrize("path", SKYREELS, ids=lambda path: path.stem)
def test_shipped_configs_name_every_setting(path):
    """A reader sees the whole run in one file."""
    left_out = {field.name for field in dataclasses.fields(RunSettings)} - yaml.safe_load(path.read_text()).keys()
    assert left_out == {"image", "video"}


@pytest.mark.parametrize("size", ["1.3b_540p", "14b_540p", "14b_720p"])
def test_presets_of_a_model_differ_in_the_cache_alone(size):
    runs = [load_settings(CONFIGS / f"skyreels_v2_{size}_{preset}.yaml")[0] for preset in ("exact", "slow", "fast")]
    same = [dataclasses.replace(run, cache=runs[0].cache) for run in runs]
    assert same[0] == same[1] == same[2]
    polynomial = POLYNOMIALS[1536, 30] if size.startswith("1.3b") else POLYNOMIAL_14B
    assert runs[1].cache.polynomial == runs[2].cache.polynomial == polynomial
    assert (runs[1].cache.threshold, runs[2].cache.threshold) == (0.1, 0.15)
    assert runs[1].cache == runs[2].cache.replace(threshold=0.1)


def test_the_published_run():
    run, _ = load_settings(CONFIGS / "skyreels_v2_1.3b_540p_slow.yaml")
    assert (run.height, run.width, run.num_frames, run.base_num_frames, run.overlap_history) == (544, 960, 177, 97, 17)
    assert (run.steps, run.guidance_scale, run.shift, run.ar_step, run.causal_block_size) == (50, 6.0, 8.0, 5, 5)
    assert (run.addnoise_condition, run.seed, run.fps, run.sigmas) == (20, 1024, 24, "original")
    assert (run.cache.alpha, run.cache.chunk_phase, run.cache.min_update_share) == (0.6, 6, 0.4)


# -- which file, which value ------------------------------------------------------------------------------------------


def test_default_is_the_tiny_model_slow():
    run, path = load_settings()
    assert path == CONFIGS / "skyreels_v2_tiny_slow.yaml"
    assert method_name(run, path, None, {}) == "motioncache-slow"


def test_a_model_brings_its_config():
    run, path = load_settings(model="/data/SkyReels-V2-DF-14B-720P-Diffusers", preset="fast")
    assert path.name == "skyreels_v2_14b_720p_fast.yaml"
    assert run.model == "/data/SkyReels-V2-DF-14B-720P-Diffusers"


@pytest.mark.parametrize(
    ("width", "files"),
    [
        (1536, "skyreels_v2_1.3b_540p_fast.yaml"),
        (5120, "skyreels_v2_14b_540p_fast.yaml or configs/skyreels_v2_14b_720p_fast.yaml"),
        (1024, "skyreels_v2_1.3b_540p_fast.yaml or .*, or a copy of one with settings for this model"),
    ],
)
def test_a_large_model_by_another_name_does_not_get_the_tiny_ones_settings(width, files):
    _, config = load_settings(model="/hub/snapshots/0123abcd", preset="fast")
    with pytest.raises(UserError, match=rf"this model has {width}; give --config configs/{files}$"):
        check_config_file(config, dataclasses.replace(REAL, width=width))
    check_config_file(CONFIGS / "skyreels_v2_1.3b_540p_slow.yaml", dataclasses.replace(REAL, width=width))


def test_a_model_as_small_as_the_tiny_one_gets_its_settings():
    tiny = json.loads((REPOSITORY / "assets/skyreels-v2-tiny/transformer/config.json").read_text())
    assert tiny["num_attention_heads"] * tiny["attention_head_dim"] == TINY_WIDTH
    _, config = load_settings(model="/somewhere/else")
    check_config_file(config, dataclasses.replace(REAL, width=TINY_WIDTH))


def test_a_preset_takes_the_cache_of_the_configs_sibling():
    slow = CONFIGS / "skyreels_v2_14b_540p_slow.yaml"
    run, path = load_settings(slow, preset="fast")
    assert path == slow and run.cache == load_settings(CONFIGS / "skyreels_v2_14b_540p_fast.yaml")[0].cache
    run, _ = load_settings(slow, preset="flowcache-slow")
    assert run.cache == load_settings(slow)[0].cache.replace(alpha=1.0)
    assert method_name(run, slow, "flowcache-slow", {}) == "flowcache-slow"


def test_a_preset_without_a_sibling_is_refused(tmp_path):
    path = tmp_path / "mine_slow.yaml"
    shutil.copy(CONFIGS / "skyreels_v2_tiny_slow.yaml", path)
    with pytest.raises(UserError, match=r"preset 'fast'.*'mine_fast.yaml'"):
        load_settings(path, preset="fast")


def test_a_summary_is_a_config(tmp_path):
    summary = {"method": "motioncache-slow", "config": settings(seed=7).to_dict(), "stages": []}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert load_settings(tmp_path / "summary.json")[0] == settings(seed=7)


def test_options_win_over_the_file():
    options = {"steps": 7, "cache.threshold": 0.3}
    run, path = load_settings(options=options)
    assert run.steps == 7 and run.cache.threshold == 0.3 and run.cache.alpha == 0.6
    assert method_name(run, path, None, options) == run.cache.tag


def test_where_the_cache_waits_does_not_change_its_name():
    options = {"cache.state_device": "cpu"}
    run, path = load_settings(options=options, preset="fast")
    assert method_name(run, path, "fast", options) == "motioncache-fast"
    options["cache.alpha"] = 0.5
    run, path = load_settings(options=options, preset="fast")
    assert method_name(run, path, "fast", options) == run.cache.tag


def test_settings_survive_yaml():
    run = settings(stock=3)
    assert RunSettings.from_dict(yaml.safe_load(yaml.safe_dump(run.to_dict()))) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidence_scale": 3}, "unknown setting 'guidence_scale'; did you mean 'guidance_scale'?"),
        ({"threshold": 0.2}, "unknown setting 'threshold'; did you mean 'cache.threshold'?"),
        ({"cache": {"treshold": 3}}, "unknown cache setting 'treshold'; did you mean 'threshold'?"),
        ({"cache": [1]}, "cache: [1] is not allowed"),
        ({"steps": "many"}, "steps: 'many' is not allowed; give a whole number"),
        ({"steps": True}, "steps: True is not allowed"),
        ({"steps": 0}, "steps: 0 is outside its range; allowed: at least 1"),
        ({"seed": -1}, "seed: -1 is outside its range; allowed: 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed: 18446744073709551616 is outside its range"),
        ({"addnoise_condition": -5}, "addnoise_condition: -5 is outside its range; allowed: 0 to 999"),
        ({"sigmas": "karras"}, "sigmas: 'karras' is not allowed; give 'original' or 'diffusers'"),
        ({"stock": "half"}, "stock: 'half' is not allowed; give 'full' or 'none' or a whole number"),
        ({"stock": 1}, "stock: 1 is outside its range; allowed: at least 2"),
        ({"guidance_scale": math.inf}, "guidance_scale: inf is not allowed; give a finite number"),
        ({"cache": {"threshold": math.inf}}, "threshold: inf is not allowed; give a finite number"),
        ({"image": "a.png", "video": "b.mp4"}, "image and video are both given"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(UserError) as error:
        RunSettings.from_dict({"model": "m", "prompt": "p", **changes})
    assert message in str(error.value)


def test_a_range_without_an_end_is_of_finite_numbers():
    check_range("--time-limit", 10**400, 0)
    with pytest.raises(UserError, match="--time-limit: inf is outside its range; allowed: at least 0, and finite$"):
        check_range("--time-limit", math.inf, 0)
    with pytest.raises(UserError, match="share: nan is outside its range; allowed: 0 to 1$"):
        check_range("share", math.nan, 0, 1)


def test_the_largest_seed_is_one():
    assert torch.Generator().manual_seed(settings(seed=LARGEST_SEED).seed).initial_seed() == LARGEST_SEED


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_a_config_needs_a_model_and_a_prompt(name):
    values = {"model": "m", "prompt": "p"}
    del values[name]
    with pytest.raises(UserError, match=f"names no {name}"):
        RunSettings.from_dict(values)


def test_unknown_preset_gets_a_hint():
    with pytest.raises(UserError, match="unknown preset 'slwo'; did you mean 'slow'?"):
        load_settings(preset="slwo")


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 540}, "height: 540 is not a multiple of 16; use 528 or 544"),
        ({"width": 8}, "width: 8 is not a multiple of 16; use 16"),
        ({"num_frames": 100}, "num_frames: 100 is not 4·k + 1, as the video autoencoder needs; use 97 or 117"),
        ({"num_frames": 78}, "num_frames: 78 is not 4·k + 1, as the video autoencoder needs; use 77 or 97"),
        ({"num_frames": 85}, "num_frames: 85 is 22 latent frames, which chunks of 5 do not fill; use 77 or 97"),
        (
            {"num_frames": 181},
            "num_frames: 181 leaves window 3 of 3 with 6 latent frames, which chunks of 5 do not fill; use 177 or 197",
        ),
        (
            {"base_num_frames": 121},
            "base_num_frames: 121 frames are 31 latent frames, which chunks of 5 do not fill; use 117 or 137",
        ),
        (
            {"overlap_history": 13},
            "overlap_history: 13 frames are 4 latent frames, which chunks of 5 do not fill; use 17 or 37",
        ),
        (
            {"overlap_history": 0},
            "overlap_history: 0 is not 4·k + 1, as the video autoencoder needs; use 17 or 37",
        ),
        ({"overlap_history": 78}, "overlap_history: 78 is not 4·k + 1, as the video autoencoder needs; use 57 or 77"),
        ({"base_num_frames": 17}, "windows of 17 frames; use a smaller causal_block_size"),
        ({"overlap_history": None}, "overlap_history: null is not allowed for more than 97 frames; use 17 or 37"),
        (
            {"overlap_history": 97},
            "overlap_history: 97 leaves nothing to generate in windows of 97 frames; use 57 or 77",
        ),
        ({"image": "a.png", "num_frames": 137}, "num_frames: 137 ends in a shorter window"),
        ({"image": "a.png", "addnoise_condition": 0}, "addnoise_condition: 0 is not allowed with an image"),
        ({"video": "a.mp4", "num_frames": 17}, "leaves none to generate; use 37"),
    ],
)
def test_wrong_shapes_are_refused_with_the_nearest_right_ones(changes, message):
    with pytest.raises(UserError) as error:
        check_shapes(settings(**changes), REAL)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["text", "image", "video"])
@pytest.mark.parametrize(
    ("name", "values"),
    [("num_frames", range(1, 260, 7)), ("overlap_history", range(0, 97, 6)), ("base_num_frames", range(22, 177, 9))],
)
def test_the_frame_counts_suggested_work(kind, name, values):
    """Each that is named is accepted, or what is said next is of another setting."""
    given = {} if kind == "text" else {kind: "file"}
    for value in values:
        try:
            check_shapes(settings(**{name: value}, **given), REAL)
        except UserError as error:
            for count in re.findall(r"\d+", str(error).rpartition("use ")[2]):
                try:
                    check_shapes(settings(**{name: int(count)}, **given), REAL)
                except UserError as second:
                    assert name != "num_frames" and not str(second).startswith(name), f"{error}, then {second}"


def test_frames_of_one_window_need_no_overlap():
    assert check_shapes(settings(num_frames=97, overlap_history=None), REAL) == [Window(0, 25, 0)]


def test_synchronous_denoising_takes_any_number_of_latent_frames():
    sync = settings(num_frames=85, ar_step=0, causal_block_size=1)
    assert check_shapes(sync, REAL) == [Window(0, 22, 0)]


def test_a_given_video_must_reach_over_the_overlap():
    with pytest.raises(UserError, match=r"has 12 frames at 24 per second, fewer than the 17 .* give a longer one$"):
        check_given_video(settings(video="clip.mp4"), [None] * 12, 4)
    with pytest.raises(UserError, match=r"or --set overlap_history=17$"):
        check_given_video(settings(video="clip.mp4", overlap_history=37), [None] * 20, 4)
    check_given_video(settings(video="clip.mp4"), [None] * 17, 4)
