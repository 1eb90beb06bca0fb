"""The measuring scripts run end to end on random weights, go on where they stopped, and add up."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from magi_random import make_magi_pipeline

from benchmarks import overhead, score_fidelity, weight_maps
from common.cache.policy import ChunkStep, Signals
from common.errors import UserError
from common.runs import REPOSITORY
from common.settings import CONFIGS


@pytest.fixture
def config(tiny_pipeline_folder, tmp_path):
    settings = yaml.safe_load((CONFIGS / "skyreels_v2_tiny_slow.yaml").read_text())
    size = {"model": str(tiny_pipeline_folder), "height": 32, "width": 32, "num_frames": 21, "steps": 12, "ar_step": 3}
    settings |= size
    settings["cache"] |= {"warmup_steps": 1, "chunk_phase": 1, "distance": "input", "distance_table": None}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    assert not module.main(), "exit code"


def small_magi(tmp_path):
    folder = tmp_path / "magi"
    make_magi_pipeline().save_pretrained(folder)
    settings = yaml.safe_load((CONFIGS / "magi1_tiny_slow.yaml").read_text())
    size = {"model": str(folder), "height": 32, "width": 48, "num_frames": 24, "steps": 8}
    path = tmp_path / "magi.yaml"
    path.write_text(yaml.safe_dump(settings | size))
    return path


@pytest.mark.parametrize("model", ["skyreels", "magi"])
def test_score_fidelity(model, request, tmp_path, monkeypatch):
    config = request.getfixturevalue("config") if model == "skyreels" else small_magi(tmp_path)
    output = tmp_path / "fidelity.json"
    run(score_fidelity, monkeypatch, "--config", config, "--prompts", 1, "--output", output)
    data = json.loads(output.read_text())
    rows = {(row["score"], row["measure"]): row for row in data["rows"]}
    assert {score for score, _ in rows} == {
        *("output motion", "latent motion", "input change", "last residual change", "random")
    }
    assert abs(rows["random", "spearman"]["all"]) < 0.1
    assert rows[data["published"], "ndcg"]["all"] <= 1
    steps = data["steps"][data["published"]]["ndcg"]
    assert len(steps) == (12 if model == "skyreels" else 8)
    assert steps[0] is None and None not in steps[1:], "nothing comes before the first step"
    early = data["tokens"]["early"]
    assert early == sorted(early) and early[-1] == 1, "all tokens hold all of the change"
    assert all(held >= share - 0.03 for held, share in zip(early, data["tokens"]["top"], strict=True))
    chunks = 2 if model == "skyreels" else 3
    assert len(data["frames"]["change"]) == len(data["frames"]["motion"]) == chunks * (3 if model == "skyreels" else 2)


def test_the_last_measured_change_foretells_a_steady_one():
    """Tokens that change by a factor of their own: ranks by change stay, and nothing else tells them."""
    recorder = score_fidelity.FidelityRecorder("output motion")
    rates = torch.linspace(1.1, 2.0, 24).view(1, 24, 1)
    inputs = torch.ones(1, 24, 4)
    for k in range(6):
        step = ChunkStep(0, k, 0, "cond", k, 6, 0.5, (2, 3, 4), 24)
        signals = Signals(inputs, latents=torch.randn(1, 24, 4))
        recorder.observe(step, None, None, signals, inputs + rates**k)
    summary = recorder.summary()
    steps = summary["steps"]["last residual change"]
    assert steps["spearman"] == [None, None, 1.0, 1.0, 1.0, 1.0]
    assert steps["ndcg"][2:] == [1.0] * 4
    assert summary["rows"][0]["score"] == "output motion"


def test_weight_maps_of_a_video(config, tmp_path):
    figure = weight_maps.draw_weights(config)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["latent frame 0", "latent frame 1", "latent frame 2"]
    chunk_level = tmp_path / "chunk_level.yaml"
    settings = yaml.safe_load(config.read_text())
    chunk_level.write_text(yaml.safe_dump(settings | {"cache": settings["cache"] | {"alpha": 1.0}}))
    with pytest.raises(UserError, match="weighs no tokens"):
        weight_maps.draw_weights(chunk_level)


def test_overhead_rows_and_line(tiny_pipeline_folder, tmp_path, monkeypatch):
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    def small():
        pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(tiny_pipeline_folder)
        size = {"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 8, "max_sequence_length": 32}
        return pipe, {"prompt": "a red circle", **size, "ar_step": 2, "causal_block_size": 3}

    monkeypatch.setitem(overhead.MODELS, "skyreels-v2-tiny", small)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which other tests would inherit
    output = tmp_path / "overhead.json"
    run(overhead, monkeypatch, "--models", "skyreels-v2-tiny", "--repeats", 1, "--threads", 1, 2, "--output", output)
    data = json.loads(output.read_text())
    forms = [(threads, form) for threads in (1, 2) for form in ("motioncache", "best", "budget")]
    assert [(line["threads"], line["form"]) for line in data["lines"]] == forms
    for case in forms:
        rows = [row for row in data["rows"] if (row["threads"], row["form"]) == case]
        shares = [row["share"] for row in rows]
        assert len(shares) == len(overhead.FORMS[case[1]][2]) and shares == sorted(shares)
        assert all(row["flops_share"] == pytest.approx(row["share"], abs=0.1) for row in rows)
    assert all(row["time_ratio"] > 0 for row in data["rows"])


def test_tables_in_documents_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts/update_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
