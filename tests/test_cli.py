"""The command as a user meets it: its words, its files, its exit codes."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_cases import FILES, OPTIONS, SUMMARY_KEYS, assert_one_line, interrupt, runner, summary_of
from conftest import change_json
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cache import Trace
from common.cli import Interrupted, Parser, count, parse_assignment, run_command
from common.errors import UserError
from common.video import read_video, write_video
from skyreels_v2_motioncache import cli
from skyreels_v2_motioncache.generate import Generator
from skyreels_v2_motioncache.loading import load_pipeline
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import plan_windows

SMALL = ["--height", "32", "--width", "32", "--num-frames", "21", "--steps", "8", "--seed", "3"]
SMALL += ["--prompt", "a red circle"]


@pytest.fixture(scope="module")
def run(tiny_pipeline_folder, tmp_path_factory):
    """The command on a random model, in this process: `run(*options)` gives its folder and exit code."""
    return runner(cli.main, tiny_pipeline_folder, SMALL, tmp_path_factory)


@pytest.fixture(scope="module")
def comparison(run):
    """One whole comparison, which chooses tokens in its later steps."""
    early = ["cache.warmup_steps=2", "cache.chunk_phase=0", "cache.min_update_share=0", "cache.distance=input"]
    early.append("cache.threshold=0.05")
    return run(*(part for setting in early for part in ("--set", setting)))


def test_comparison_writes_all_files(comparison):
    folder, code = comparison
    assert code == 0
    assert {file.name for file in folder.iterdir()} == FILES
    assert read_video(folder / "video.mp4").shape == (21, 32, 32, 3)


def test_summary_agrees_with_the_trace(comparison):
    folder, _ = comparison
    summary = summary_of(folder)
    assert set(SUMMARY_KEYS.split()) <= summary.keys()
    trace = Trace.from_dict(json.loads((folder / "trace.json").read_text()))
    assert trace.totals() == {key: summary[key] for key in ("tokens_computed", "tokens_total")}
    assert 0 < summary["tokens_computed"] < summary["tokens_total"]
    assert any(record.decision == "select" for record in trace.records)
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == ["stock", "exact", summary["method"]]
    assert stages["exact"]["tokens_computed"] == summary["tokens_total"] < stages["stock"]["tokens_computed"]
    assert stages["stock"]["flops"] > stages["exact"]["flops"] > summary["flops"] > 0
    assert summary["speedup_vs_exact"] == stages["exact"]["seconds"] / summary["wall_seconds"]
    assert summary["config"]["cache"]["chunk_phase"] == 0 and summary["seed"] == 3


def test_exact_equals_stock_and_the_method_is_near(comparison):
    summary = summary_of(comparison[0])
    assert summary["exact_vs_stock_max_error"] < 1e-4
    assert summary["stages"][0]["psnr_db"] > 80
    assert 20 < summary["psnr_db"] < 100 and 0 < summary["ssim"] < 1


def test_a_run_can_be_repeated_from_its_summary(comparison, run):
    """`summary.json` is a config file, and the same seed gives the same video."""
    folder, code = run("--config", str(comparison[0] / "summary.json"), "--no-compare")
    assert code == 0
    np.testing.assert_array_equal(read_video(folder / "video.mp4"), read_video(comparison[0] / "video.mp4"))


def test_without_comparison_only_the_method_runs(run):
    folder, code = run("--no-compare", "--preset", "fast")
    assert code == 0
    summary = summary_of(folder)
    assert [stage["name"] for stage in summary["stages"]] == ["motioncache-fast"]
    assert summary["speedup_vs_exact"] is None and summary["psnr_db"] is None
    assert not (folder / "exact.mp4").exists() and (folder / "video.mp4").exists()


def test_exact_is_compared_with_stock(run):
    folder, code = run("--preset", "exact")
    assert code == 0
    summary = summary_of(folder)
    assert [stage["name"] for stage in summary["stages"]] == ["stock", "exact"]
    assert summary["speedup_vs_stock"] > 0 and summary["tokens_computed"] == summary["tokens_total"]
    assert (folder / "side_by_side.mp4").exists()


def test_stock_can_be_estimated_from_a_few_iterations(run):
    folder, code = run("--set", "stock=3", "--preset", "exact")
    assert code == 0
    stock = summary_of(folder)["stages"][0]
    assert stock["measured_iterations"] == 3 and stock["psnr_db"] is None
    full = summary_of(run("--preset", "exact")[0])["stages"][0]
    assert stock["flops"] == full["flops"] and stock["tokens_computed"] == full["tokens_computed"]


def test_a_video_is_continued(run, tmp_path):
    given = np.zeros((14, 40, 60, 3), np.uint8)
    given[..., 0] = np.arange(14)[:, None, None] * 16
    write_video(tmp_path / "given.mp4", given, fps=16)
    folder, code = run("--video", str(tmp_path / "given.mp4"), "--num-frames", "33")
    assert code == 0
    video = read_video(folder / "video.mp4")
    assert video.shape == (14 + 33 - 9, 32, 32, 3)
    np.testing.assert_allclose(video[:14].mean((1, 2))[:, 0], np.arange(14) * 16, atol=6)
    summary = summary_of(folder)
    assert summary["exact_vs_stock_max_error"] is not None


@pytest.mark.parametrize("schedule", [[], ["--set", "ar_step=0", "--set", "causal_block_size=1"]])
def test_a_video_starts_with_an_image(run, tmp_path, schedule):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "image.png")
    folder, code = run("--image", str(tmp_path / "image.png"), "--set", "prefix_noise=fresh", *schedule)
    assert code == 0
    assert summary_of(folder)["exact_vs_stock_max_error"] < 1e-4


def test_an_image_is_the_first_latent_frame(tiny_pipeline_folder):
    """Of a video denoised in chunks of several frames, where the stock pipeline alone would denoise it away."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    settings = RunSettings(
        str(tiny_pipeline_folder),
        "a red circle",
        image="given",
        height=32,
        width=32,
        num_frames=21,
        steps=4,
        ar_step=2,
        causal_block_size=3,
        addnoise_condition=20,
        max_sequence_length=8,
    )
    pipe = load_pipeline(tiny_pipeline_folder, "image", sigmas="diffusers")
    pipe.set_progress_bar_config(disable=True)
    generator = Generator(pipe, settings, plan_windows("image", 21, 21, None, 3), image=image)
    generator.encode()
    latents = generator.run().latents
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents[:, :, :1], expected, atol=1e-5, rtol=1e-4)


def test_a_long_video_comes_in_windows(run):
    folder, code = run(
        "--num-frames", "33", "--set", "base_num_frames=21", "--preset", "exact", "--set", "addnoise_condition=0"
    )
    assert code == 0
    assert len(read_video(folder / "video.mp4")) == 33
    trace = Trace.from_dict(json.loads((folder / "trace.json").read_text()))
    assert {record.window for record in trace.records} == {0, 1}
    assert summary_of(folder)["exact_vs_stock_max_error"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--promt", "x"], "unknown option '--promt'; did you mean '--prompt'?"),
        (["--steps", "x"], "argument --steps: 'x' is not a whole number"),
        (["--guidance-scale", "nan"], "'nan' is not a number"),
        (["--steps"], "expected one argument"),
        (["stray"], "'stray' belongs to no option"),
        (["--set", "steps"], "not of the form KEY=VALUE"),
        (["--set", "threshold=0.2"], "unknown setting 'threshold'; did you mean 'cache.threshold'?"),
        (["--output", ""], "argument --output: '' names no folder; give one, or . for this one"),
        (["--seed", str(2**64)], "outside its range; allowed: 0 to 18446744073709551615"),
        (["--set", "cache.alpha=1.5"], "alpha: 1.5 is outside its range; allowed: 0 to 1"),
        (["--preset", "slwo"], "did you mean 'slow'?"),
        (["--height", "100"], "height: 100 is not a multiple of 16; use 96 or 112"),
        (["--num-frames", "46"], "num_frames: 46 is not 4·k + 1, as the video autoencoder needs; use 45 or 57"),
        (["--num-frames", "41"], "num_frames: 41 is 11 latent frames, which chunks of 3 do not fill; use 33 or 45"),
        (["--dtype", "fp4"], "dtype: 'fp4' is not allowed"),
        (["--device", "tpu"], "device: 'tpu' is not allowed"),
        (["--offload", "model", "--device", "cpu"], "use --offload none"),
        (["--image", "nowhere.png"], "image 'nowhere.png' cannot be read: No such file or directory"),
        (["--video", "nowhere.mp4"], "video 'nowhere.mp4' does not exist"),
        (["--config", "nowhere.yaml"], "config 'nowhere.yaml' cannot be read"),
        (["--model", "assets/nowhere"], "model 'assets/nowhere' is neither a folder nor the name"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, options, message):
    assert_one_line(run, capsys, options, message)


def test_a_large_model_needs_its_config(run, capsys, tiny_pipeline_folder, tmp_path):
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "snapshots" / "0123abcd")
    change_json(folder / "transformer/config.json", num_attention_heads=12, attention_head_dim=128)
    assert_one_line(run, capsys, ["--model", str(folder)], "give --config configs/skyreels_v2_1.3b_540p_slow.yaml")


def test_numbers_beyond_half_precision_end_the_run_before_a_video_is_written(
    run, capsys, tiny_pipeline_folder, tmp_path
):
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "large")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"] *= 1e7
    save_file(tensors, file, {"format": "pt"})
    options = ["--model", str(folder), "--dtype", "float16"]
    assert_one_line(run, capsys, options, "not finite after iteration 1, with dtype float16; use --dtype bfloat16")


def test_a_prompt_of_markup_and_tex_runs_and_is_shown(run, capsys):
    prompt = "[wide shot] a 'b' [/red] circle costs $^$ 5_"
    folder, code = run("--no-compare", "--prompt", prompt)
    assert code == 0 and {"summary.json", "motion.png"} <= {file.name for file in folder.iterdir()}
    assert f'"{prompt}"' in capsys.readouterr().out


def test_one_chunk_is_warned_of_once(run, capsys):
    assert run("--set", "causal_block_size=1", "--set", "ar_step=0", "--set", "stock=none")[1] == 0
    assert " ".join(capsys.readouterr().out.split()).count("are cached as one chunk") == 1


def test_unwritable_output_is_refused(run, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    _, code = run("--output", str(tmp_path / "file" / "out"))
    assert code == 2 and "cannot be written" in capsys.readouterr().err


def test_help_names_every_option_and_both_gpus(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"  --{option} " in text for option in [*OPTIONS.split(), "negative-prompt"])
    assert "24 GB" in text and "80 GB" in text


def test_interruption_keeps_what_is_complete(tiny_pipeline_folder, tmp_path):
    """Ctrl-C in the third stage, which is long: the exact video is there and named."""
    long = ["--model", str(tiny_pipeline_folder), *SMALL, "--steps", "150", "--set", "stock=none"]
    errors = interrupt("skyreels_v2_motioncache", long, tmp_path / "out")
    assert f"interrupted: complete in {tmp_path / 'out'}: exact.mp4" in errors


def test_words_that_the_model_does_not_know_are_named(run, capsys):
    _, code = run("--no-compare", "--prompt", "a red zebra moving left, sideways")
    assert code == 0 and "does not know the words: zebra, sideways." in capsys.readouterr().out.replace("\n", " ")


def test_exit_codes(capsys):
    def bad():
        raise UserError("two\nlines")

    def stopped():
        raise Interrupted("complete in out: video.mp4")

    assert run_command(lambda: None) == 0
    assert run_command(bad) == 2 and run_command(stopped) == 130
    assert capsys.readouterr().err == "error: two lines\n\ninterrupted: complete in out: video.mp4\n"


def test_subcommands_name_the_nearest_option_of_all():
    parser = Parser("draw")
    parser.add_subparsers(dest="name", required=True).add_parser("curve").add_argument("--colour", type=count)
    assert parser.parse_args(["curve", "--colour", "2"]).colour == 2
    for words, message in (
        (["curve", "--color", "2"], "unknown option '--color'; did you mean '--colour'?"),
        (["curve", "--colour", "0"], "argument --colour: 0 is outside its range; allowed: at least 1; see draw curve"),
        (["curv"], "invalid choice: 'curv'"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(words)
        assert message in str(error.value)


def test_assignments_are_read_as_yaml():
    assert parse_assignment("cache.threshold=0.15") == ("cache.threshold", 0.15)
    assert parse_assignment("shift=null") == ("shift", None)
    assert parse_assignment("prompt=a=b") == ("prompt", "a=b")
    assert parse_assignment("cache.threshold=1e-1") == ("cache.threshold", 0.1)
