"""The MAGI-1 command as a user meets it: its words, its files, its exit codes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_cases import FILES, OPTIONS, SUMMARY_KEYS, assert_one_line, interrupt, runner, summary_of
from PIL import Image

from common.cache import Trace
from common.video import read_video, write_video
from magi1_motioncache import cli

SMALL = ["--height", "32", "--width", "32", "--num-frames", "32", "--steps", "8", "--prompt", "a red circle"]
EARLY = {"warmup_steps": 1, "chunk_phase": 2, "threshold": 0.1}
SET_EARLY = [part for key, value in EARLY.items() for part in ("--set", f"cache.{key}={value}")]


@pytest.fixture(scope="module")
def run(magi_folder, tmp_path_factory):
    """The command on a random model, in this process: `run(*options)` gives its folder and exit code."""
    return runner(cli.main, magi_folder, SMALL, tmp_path_factory)


@pytest.fixture(scope="module")
def comparison(run):
    """One whole comparison, which chooses tokens in its later steps."""
    return run(*SET_EARLY)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A video of 45 frames that gets redder."""
    frames = np.zeros((45, 40, 60, 3), np.uint8)
    frames[..., 0] = np.arange(45)[:, None, None] * 5
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames, fps=24)
    return path


def test_comparison_writes_all_files(comparison):
    folder, code = comparison
    assert code == 0
    assert {file.name for file in folder.iterdir()} == FILES
    assert read_video(folder / "video.mp4").shape == (32, 32, 32, 3)


def test_summary_has_the_fields_of_the_other_command_and_agrees_with_the_trace(comparison):
    folder, _ = comparison
    summary = summary_of(folder)
    assert set(SUMMARY_KEYS.split()) <= summary.keys()
    assert summary["mode"] == "t2v" and summary["speedup_vs_stock"] is None
    trace = Trace.from_dict(json.loads((folder / "trace.json").read_text()))
    assert trace.totals() == {key: summary[key] for key in ("tokens_computed", "tokens_total")}
    assert any(record.decision == "select" for record in trace.records)
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == ["exact", summary["method"]]
    assert stages["exact"]["tokens_computed"] == summary["tokens_total"] > summary["tokens_computed"] > 0
    assert stages["exact"]["flops"] > summary["flops"] > 0
    assert summary["speedup_vs_exact"] == stages["exact"]["seconds"] / summary["wall_seconds"]
    assert 10 < summary["psnr_db"] < 100 and 0 < summary["ssim"] < 1


def test_a_run_can_be_repeated_from_its_summary(comparison, run):
    folder, code = run("--config", str(comparison[0] / "summary.json"), "--no-compare")
    assert code == 0
    np.testing.assert_array_equal(read_video(folder / "video.mp4"), read_video(comparison[0] / "video.mp4"))


def test_without_comparison_only_the_method_runs(run, capsys):
    folder, code = run("--no-compare", "--preset", "flowcache-fast")
    assert code == 0
    summary = summary_of(folder)
    assert [stage["name"] for stage in summary["stages"]] == ["flowcache-fast"]
    assert summary["speedup_vs_exact"] is None and summary["psnr_db"] is None
    assert not (folder / "exact.mp4").exists() and (folder / "video.mp4").exists()
    assert "stock" not in capsys.readouterr().out


def test_state_can_wait_in_main_memory(comparison, run):
    """Only the place differs on a CPU; what is computed must not."""
    folder, code = run("--no-compare", *SET_EARLY, "--set", "cache.state_device=cpu")
    assert code == 0
    np.testing.assert_array_equal(read_video(folder / "video.mp4"), read_video(comparison[0] / "video.mp4"))


def test_half_precision_runs(run):
    folder, code = run("--no-compare", "--dtype", "bfloat16", "--num-frames", "16")
    assert code == 0 and summary_of(folder)["dtype"] == "bfloat16"


def test_an_image_starts_a_video(run, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "image.png")
    folder, code = run("--mode", "i2v", "--image", str(tmp_path / "image.png"), *SET_EARLY)
    assert code == 0
    assert summary_of(folder)["mode"] == "i2v" and len(read_video(folder / "video.mp4")) == 32
    assert not np.array_equal(read_video(folder / "video.mp4"), read_video(run("--no-compare")[0] / "video.mp4"))


@pytest.mark.parametrize("overlap", [8, 12])
def test_a_video_is_continued(run, clip, overlap):
    """From its last frames, which fill one chunk, or one and a half."""
    folder, code = run("--mode", "v2v", "--video", str(clip), "--set", f"overlap_history={overlap}", *SET_EARLY)
    assert code == 0
    video = read_video(folder / "video.mp4")
    assert video.shape == (45 + 32 - overlap, 32, 32, 3)
    np.testing.assert_allclose(video[:45].mean((1, 2))[:, 0], np.arange(45) * 5, atol=8)
    assert summary_of(folder)["mode"] == "v2v" and (folder / "motion.png").exists()


def test_a_given_video_keeps_its_speed(run, tmp_path):
    given = np.zeros((30, 32, 32, 3), np.uint8)
    given[..., 0] = np.arange(30)[:, None, None] * 8
    write_video(tmp_path / "given.mp4", given, fps=30)
    folder, code = run("--video", str(tmp_path / "given.mp4"), "--no-compare", "--set", "overlap_history=8")
    assert code == 0
    video = read_video(folder / "video.mp4")
    assert len(video) == 24 + 32 - 8
    np.testing.assert_allclose(video[:24].mean((1, 2))[:, 0], np.arange(24) * 10, atol=8)


def test_published_settings_of_every_method(run):
    for preset in ("slow", "flowcache-slow", "teacache-slow", "exact"):
        folder, code = run("--no-compare", "--preset", preset, "--num-frames", "16")
        assert code == 0
        assert summary_of(folder)["method"] == ("motioncache-slow" if preset == "slow" else preset)


BAD = [
    (["--mode", "x2v"], "mode: 'x2v' is not allowed; give 't2v' or 'i2v' or 'v2v' or null"),
    (["--mode", "i2v"], "mode: 'i2v' needs a given image; add --image FILE"),
    (["--mode", "v2v"], "mode: 'v2v' needs a given video; add --video FILE"),
    (["--mode", "t2v", "--image", "a.png"], "mode: 't2v' contradicts the given image"),
    (["--image", "a.png", "--video", "b.mp4"], "image and video are both given"),
    (["--promt", "x"], "unknown option '--promt'; did you mean '--prompt'?"),
    (["--steps", "10"], "steps: 10 is not a multiple of 4 (window_size), so no chunk"),
    (["--height", "100"], "height: 100 is not a multiple of 16; use 96 or 112"),
    (["--width", "16"], "width: 16 is outside its range; allowed: at least 32"),
    (["--num-frames", "30"], "num_frames: 30 is not a multiple of 8, the frames of a chunk of 2; use 24 or 32"),
    (["--preset", "slwo"], "did you mean 'slow'?"),
    (["--set", "sampling.windowsize=2"], "unknown sampling setting 'windowsize'; did you mean 'window_size'?"),
    (["--set", "sampling.window_size=two"], "sampling.window_size: 'two' is not allowed; give a whole number"),
    (["--set", "sampling.cfg_number=2"], "cfg_number 2 is neither 1"),
    (["--set", "sampling=3"], "sampling: 3 is not allowed; give lines of 'key: value' under it"),
    (["--set", "overlap_history=40"], "overlap_history: 40 is outside its range; allowed: 1 to 32"),
    (["--set", "special_tokens=[high_quality]"], "special_tokens: ['high_quality'] are not in this checkpoint"),
    (["--set", "special_tokens=[hq]"], "unknown special token 'hq'"),
    (["--set", "special_tokens_file=nowhere.npz"], "special_tokens_file 'nowhere.npz' does not exist"),
    (["--set", "cache.distance=modulation"], "MAGI-1 has no time modulation"),
    (
        ["--set", "sampling.cfg_number=1"],
        "sampling.cfg_number: 1 is not allowed for a base checkpoint; give the --config",
    ),
    (["--set", "sampling.clean_t=5"], "clean_t: 5 is outside its range; allowed: 0 to 1"),
    (["--set", "special_tokens=high_quality"], "special_tokens: 'high_quality' is not a list; give [high_quality]"),
    (["--device", "tpu"], "device: 'tpu' is not allowed"),
    (["--offload", "model", "--device", "cpu"], "use --offload none"),
    (["--image", "nowhere.png"], "image 'nowhere.png' cannot be read"),
    (["--video", "nowhere.mp4"], "video 'nowhere.mp4' does not exist"),
    (["--config", "nowhere.yaml"], "config 'nowhere.yaml' cannot be read"),
    (["--model", "assets/nowhere"], "model 'assets/nowhere' is not a folder"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, options, message):
    assert_one_line(run, capsys, options, message)


def test_a_short_video_is_refused(run, tmp_path, capsys):
    """By its frames at the settings' rate: 28 of them become 14."""
    write_video(tmp_path / "short.mp4", np.zeros((28, 32, 32, 3), np.uint8), fps=48)
    given = ["--video", str(tmp_path / "short.mp4"), "--num-frames", "40", "--no-compare"]
    _, code = run(*given, "--set", "overlap_history=32")
    errors = capsys.readouterr().err
    assert code == 2 and "has 14 frames at 24 per second, fewer than the 32" in errors
    shorter = re.search(r"--set (overlap_history=\d+)", errors).group(1)
    assert run(*given, "--set", shorter)[1] == 0


def test_a_distilled_checkpoint_has_one_pass(run, magi_folder, tmp_path, capsys):
    folder = shutil.copytree(magi_folder, tmp_path / "distilled")
    index = json.loads((folder / "model_index.json").read_text())
    index["sampling"] |= {"distill": True, "cfg_number": 1}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert run("--model", str(folder))[1] == 2
    assert "sampling.cfg_number: 3 is not allowed for a distilled checkpoint" in capsys.readouterr().err
    one_pass = ["--model", str(folder), "--set", "sampling.cfg_number=1", "--num-frames", "16"]
    assert run(*one_pass, "--guidance-scale", "3")[1] == 2
    assert "guidance_scale: 3 is not allowed with one pass" in capsys.readouterr().err
    assert run(*one_pass)[1] == 0


def test_the_default_checkpoint_is_the_tiny_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("common.checkpoints.REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 2
    assert "model 'assets/magi1-tiny' is not a folder" in capsys.readouterr().err


def test_help_names_every_option_and_both_gpus(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"  --{option} " in text for option in [*OPTIONS.split(), "mode"])
    assert "24 GB" in text and "80 GB" in text and "no stock" in text


def test_interruption_keeps_the_chunks_that_are_clean(magi_folder, tmp_path):
    """Ctrl-C after the first chunk of the first stage: it is there, can be watched, and is named."""
    folder = tmp_path / "out"
    long = ["--model", str(magi_folder), *SMALL, "--steps", "400"]
    errors = interrupt("magi1_motioncache", long, folder)
    (frames,) = re.findall(rf"interrupted: complete in {folder}: exact\.mp4 \(frames 1 to (\d+) of 32\)", errors)
    assert frames in ("8", "16", "24") and len(read_video(folder / "exact.mp4")) == int(frames)


def test_words_that_the_model_does_not_know_are_named(run, capsys):
    _, code = run("--no-compare", "--num-frames", "8", "--prompt", "A red zebra moving left, sideways")
    assert code == 0 and "does not know the words: zebra, sideways." in capsys.readouterr().out.replace("\n", " ")


def test_a_prompt_that_cleaning_empties_is_told(run, capsys):
    _, code = run("--no-compare", "--num-frames", "8", "--prompt", "@somebody")
    assert code == 0 and "Nothing of this prompt is left" in capsys.readouterr().out
