"""The measuring scripts run end to end on random weights, go on where they stopped, and add up."""

import json
import subprocess
import sys

import pytest
import yaml

from benchmarks import overhead, quality, score_fidelity
from common.cache import MotionCacheConfig
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
    module.main()


def test_quality_at_matched_compute(config, tmp_path, monkeypatch):
    output = tmp_path / "quality.json"
    arguments = ("--config", config, "--prompts", 2, "--shares", 0.5, 0.3, "--processes", 1, "--output", output)
    run(quality, monkeypatch, *arguments)
    data = json.loads(output.read_text())
    assert not list(tmp_path.glob("*.jsonl"))
    rows = {(row["method"], row["target_share"]): row for row in data["rows"]}
    assert {method for method, _ in rows} == {
        *("flowcache/modulation", "motioncache/modulation", "flowcache/table", "motioncache/table"),
        *("motioncache+neighbour-kv/table", "flowcache+logsnr/table", "motioncache+logsnr/table", "exact-bfloat16"),
    }
    for (method, target), row in rows.items():
        assert row["n"] == 2 and 0 < row["psnr_db"] <= 100
        if target:
            assert row["share"] == pytest.approx(target, abs=0.12), (method, target)
            assert ("psnr_db_minus_chunk_level" in row) == (not method.startswith("flowcache/"))
    assert len(data["distances"]["table"]["distance_table"]) == 12


def test_an_interrupted_measurement_goes_on(config, tmp_path, monkeypatch):
    output = tmp_path / "quality.json"
    arguments = ("--config", config, "--prompts", 2, "--shares", 0.5, "--processes", 1, "--output", output)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(quality, "summarise", stop)
        run(quality, broken, *arguments)
    jobs = tmp_path / "quality.jobs.jsonl"
    finished = jobs.read_text().splitlines()
    assert len(finished) == 8 + 1 + 2  # recordings, searches, evaluations
    jobs.write_text("\n".join(finished) + "\n")
    monkeypatch.setattr(quality, "_record", stop)  # would fail if it were called
    run(quality, monkeypatch, *arguments)
    assert output.exists()


def test_jobs_of_another_checkpoint_are_refused(config, tmp_path, monkeypatch):
    output = tmp_path / "quality.json"
    output.with_suffix(".jobs.jsonl").write_text(json.dumps({"fingerprint": "old", "job": "record 0", "result": []}))
    with pytest.raises(UserError, match="another checkpoint"):
        run(quality, monkeypatch, "--config", config, "--output", output, "--processes", 1)


def test_chunk_level_threshold_foretells_the_share():
    changes = [0.0] + [0.1] * 19
    config = MotionCacheConfig(warmup_steps=4)
    tau = quality.chunk_level_threshold(changes, config, chunks=1, target=0.4)
    # Four steps of warm-up, then every fourth of sixteen.
    assert 0.3 < tau <= 0.4 + 1e-3


def test_score_fidelity(config, tmp_path, monkeypatch):
    output = tmp_path / "fidelity.json"
    run(score_fidelity, monkeypatch, "--config", config, "--prompts", 1, "--output", output)
    rows = {(row["score"], row["measure"]): row for row in json.loads(output.read_text())["rows"]}
    assert abs(rows["random", "spearman"]["all"]) < 0.1
    assert rows["output motion (published)", "ndcg"]["all"] <= 1
    assert 0.1 <= rows["top tenth of tokens", "share of squared change"]["all"] <= 1


def test_overhead_rows_and_line(tiny_pipeline_folder, tmp_path, monkeypatch):
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    def small():
        pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(tiny_pipeline_folder)
        size = {"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 8, "max_sequence_length": 32}
        return pipe, {"prompt": "a red circle", **size, "ar_step": 2, "causal_block_size": 3}

    monkeypatch.setitem(overhead.MODELS, "skyreels-v2-tiny", small)
    output = tmp_path / "overhead.json"
    run(overhead, monkeypatch, "--models", "skyreels-v2-tiny", "--repeats", 1, "--threads", 1, "--output", output)
    data = json.loads(output.read_text())
    shares = [row["share"] for row in data["rows"]]
    assert len(shares) == len(overhead.SHARES) and shares == sorted(shares)
    assert all(row["time_ratio"] > 0 for row in data["rows"])


def test_tables_in_documents_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts/update_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
