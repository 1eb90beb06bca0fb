"""Sampling many videos: resumed by content, spread over processes, killed at any moment; and their scores."""

import json
import multiprocessing
import random
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from sampling_jobs import METHODS, contents, finished, run_as_rank, write_experiment

from benchmarks import sample, samples, sampling, score
from benchmarks.experiment import Experiment
from common.cache import Trace
from common.errors import UserError
from common.runs import REPOSITORY
from common.video import read_video

KILLS = 20


@pytest.fixture(scope="module")
def job(tiny_pipeline_folder, tmp_path_factory):
    """The experiment file of the small job."""
    return write_experiment(tmp_path_factory.mktemp("job"), tiny_pipeline_folder)


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    """All of the job's samples, made in one go."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert sample.main([str(job), "--output", str(output)]) == 0
    return output


@pytest.fixture
def output(undisturbed, tmp_path):
    """A copy of the samples to change."""
    return shutil.copytree(undisturbed, tmp_path / "out")


@pytest.fixture(scope="module")
def forkserver():
    """Starts processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(["benchmarks.sample"])
        process = context.Process(target=print)
        process.start()
        process.join()
    return context


def summaries(output, method):
    files = sorted((output / method).glob("*.json"))
    return [json.loads(f.read_text()) for f in files if not f.name.endswith((".trace.json", ".scores.json"))]


def times(output):
    return {name: changed for name, (_, changed) in finished(output).items()}


def test_settings_of_the_experiment_are_those_of_its_samples(job, tmp_path):
    path = tmp_path / "shorter.yaml"
    path.write_text(f"{job.read_text()}settings: {{steps: 3}}\n")
    assert sample.main([str(path), "--output", str(tmp_path / "out"), "--prompts", "1"]) == 0
    for method in METHODS:
        assert [s["config"]["steps"] for s in summaries(tmp_path / "out", method)] == [3]
    trace = Trace.from_dict(json.loads(next((tmp_path / "out/exact").glob("*.trace.json")).read_text()))
    assert {record.step for record in trace.records if record.role == "denoise"} == {0, 1, 2}
    assert json.loads((tmp_path / "out/experiment.json").read_text())["settings"] == {"steps": 3}


def test_each_method_has_each_prompt_with_all_its_figures(job, undisturbed):
    experiment = Experiment.load(job)
    for method in METHODS:
        of_method = summaries(undisturbed, method)
        assert [s["prompt"] for s in of_method] == [p.text for p in experiment.prompts]
        for prompt, summary in zip(experiment.prompts, of_method, strict=True):
            assert (summary["method"], summary["index"], summary["seed"]) == (method, prompt.index, prompt.seed)
            assert summary["seconds"] > 0 and summary["flops"] > 0 and summary["config"]["prompt"] == prompt.text
            assert (summary["dtype"], summary["device"], summary["threads"]) == ("float32", "cpu", 1)
            assert {"fingerprint", "model", "peak_bytes", "versions", "commit"} <= summary.keys()
    exact, cached, stock = (summaries(undisturbed, name)[0] for name in ("exact", "motioncache", "stock"))
    assert exact["tokens_computed"] == exact["tokens_total"] == cached["tokens_total"] == stock["tokens_total"]
    assert cached["tokens_computed"] < cached["tokens_total"] < stock["tokens_computed"]
    assert cached["flops"] < exact["flops"] < stock["flops"]
    assert cached["config"]["cache"]["threshold"] == 0.4 and stock["config"]["cache"] is None
    trace = Trace.from_dict(json.loads(next((undisturbed / "motioncache").glob("*.trace.json")).read_text()))
    assert trace.totals()["tokens_computed"] == cached["tokens_computed"]


def test_lossless_and_viewable_videos_show_the_same(undisturbed):
    for file in undisturbed.glob("*/*.mkv"):
        frames, shown = read_video(file), read_video(file.with_suffix(".mp4"))
        assert frames.shape == shown.shape == (21, 16, 16, 3)
        assert np.abs(frames.astype(int) - shown).mean() < 12
    stock, exact = (read_video(sorted((undisturbed / name).glob("*.mkv"))[0]) for name in ("stock", "exact"))
    assert np.abs(stock.astype(int) - exact).max() <= 1


def test_what_is_finished_is_not_made_again(job, output, monkeypatch):
    before = finished(output)
    monkeypatch.setattr(sampling, "Sampler", lambda *_: pytest.fail("a model was loaded"))
    assert sample.main([str(job), "--output", str(output)]) == 0
    assert finished(output) == before


def test_what_is_damaged_is_made_again_and_nothing_else(job, output):
    before = times(output)
    mp4, mkv = sorted((output / "exact").glob("*.mp4"))[0], sorted((output / "stock").glob("*.mkv"))[1]
    mp4.write_bytes(mp4.read_bytes()[:-7])
    mkv.unlink()
    summary = output / "motioncache" / (mp4.stem + ".json")
    summary.write_text("{")
    assert sample.main([str(job), "--output", str(output)]) == 0
    changed = {name for name, time_of in times(output).items() if before.get(name) != time_of}
    redone = (("exact", mp4.stem), ("stock", mkv.stem), ("motioncache", mp4.stem))
    assert {name.split(".")[0] for name in changed} == {f"{method}/{stem}" for method, stem in redone}


def test_a_changed_setting_redoes_its_method_alone(job, output, tiny_pipeline_folder, tmp_path):
    methods = {**METHODS, "motioncache": {"cache": {"threshold": 0.9}}}
    before = times(output)
    other = write_experiment(tmp_path / "other", tiny_pipeline_folder, methods)
    assert sample.main([str(other), "--output", str(output)]) == 0
    changed = {name for name, time_of in times(output).items() if before[name] != time_of}
    assert changed and {name.split("/")[0] for name in changed} == {"motioncache"}
    assert {s["config"]["cache"]["threshold"] for s in summaries(output, "motioncache")} == {0.9}


def test_the_same_weights_elsewhere_are_the_same_and_others_are_not(job, tiny_pipeline_folder, tmp_path):
    moved = shutil.copytree(tiny_pipeline_folder, tmp_path / "moved")
    (moved / "README.md").write_text("words")
    digest = samples.weights_digest(tiny_pipeline_folder)
    assert samples.weights_digest(moved) == digest
    weights = next((moved / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert samples.weights_digest(moved) != digest
    plans = [sampling.Plan(Experiment.load(job), samples.SampleFolder(tmp_path), word) for word in (digest, "other")]
    method, prompt = plans[0].experiment.methods["exact"], plans[0].experiment.prompts[0]
    assert plans[0].fingerprint(method, prompt) != plans[1].fingerprint(method, prompt)


def test_a_failing_sample_leaves_the_others(job, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    real = sampling.sample

    def fails_once(generator, config, *rest):
        if config.method != "exact" and generator.settings.seed == 0:
            raise torch.OutOfMemoryError("no memory for this one")
        return real(generator, config, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(sampling, "sample", fails_once)
        assert sample.main([str(job), "--output", str(output)]) == sample.EXIT_FAILED
    said = " ".join(capsys.readouterr().out.split())
    assert "5 of 6 samples are complete" in said
    assert "not made: motioncache, 0000-" in said and "no memory for this one" in said
    (note,) = output.glob("*/*.error.txt")
    assert "Traceback" in note.read_text() and note.parent.name == "motioncache"
    kept = times(output)
    assert sample.main([str(job), "--output", str(output)]) == 0
    assert not list(output.glob("*/*.error.txt")) and kept.items() <= times(output).items()


def test_without_the_reference_stock_is_not_made(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "sample", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    arguments = [str(job), "--output", str(tmp_path / "out"), "--prompts", "1"]
    assert sample.main(arguments) == sample.EXIT_FAILED
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 samples are complete" in said and "not made: stock" in said and "exact sample" in said


def test_ctrl_c_says_what_is_complete(job, tmp_path, monkeypatch, capsys):
    real, calls = sampling.sample, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sampling, "sample", interrupted)
    assert sample.main([str(job), "--output", str(tmp_path / "out")]) == 130
    assert "1 of 6 samples are complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml", "--output", "x"], "nothing.yaml"),
        (["{job}", "--output", "{job}"], "cannot be written"),
        (["{job}", "--output", "{tmp}", "--processes", "0"], "at least 1"),
        (["{job}", "--output", "{tmp}", "--prompts", "0"], "at least 1"),
    ],
)
def test_bad_arguments_get_one_line(job, tmp_path, capsys, arguments, message):
    filled = [word.format(job=job, tmp=tmp_path) for word in arguments]
    assert sample.main(filled) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_run(tiny_pipeline_folder, tmp_path, capsys, forkserver):
    experiment = write_experiment(tmp_path / "job", tiny_pipeline_folder, num_frames=22)
    for processes in ("1", "2"):
        assert sample.main([str(experiment), "--output", str(tmp_path / "out"), "--processes", processes]) == 2
        error = capsys.readouterr().err
        assert "num_frames" in error and error.count("\n") == 1


def test_two_processes_make_the_same_bits_as_one(job, undisturbed, tmp_path, forkserver):
    output = tmp_path / "out"
    assert sample.main([str(job), "--output", str(output), "--processes", "2"]) == 0
    assert contents(output) == contents(undisturbed)


def test_two_processes_of_accelerate_make_the_same_bits_as_one(job, undisturbed, tmp_path, forkserver):
    output = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(job), "--output", str(output)]
    ranks = [forkserver.Process(target=run_as_rank, args=(rank, 2, port, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert contents(output) == contents(undisturbed)


def test_a_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sampling.Place.of(torch.device("cuda"), 5, 8, 1).device == torch.device("cuda:1")
    assert sampling.Place.of(torch.device("cuda:1"), 0, 1, 0).device == torch.device("cuda:1")
    assert sampling.Place.of(torch.device("cpu"), 3, 4, 3).device == torch.device("cpu")
    with pytest.raises(UserError, match="process 3 of this machine finds no GPU of its own among 2"):
        sampling.Place.of(torch.device("cuda"), 2, 3, 2)


def test_killed_at_any_moment_nothing_finished_is_lost(tiny_pipeline_folder, tmp_path, forkserver):
    """Runs are killed at random moments and resumed until the set is whole, then a new set is begun."""
    experiment = write_experiment(tmp_path / "job", tiny_pipeline_folder, num_frames=9, steps=2)
    moments, kills, sets = random.Random(0), 0, 0

    def start(output):
        process = forkserver.Process(target=sample.main, args=([str(experiment), "--output", str(output)],))
        process.start()
        return process

    began = time.perf_counter()
    whole = start(tmp_path / "whole")
    whole.join()
    duration = time.perf_counter() - began
    expected = contents(tmp_path / "whole")
    assert len(expected) == 12
    while kills < KILLS:
        sets += 1
        output, before = tmp_path / f"out{sets}", {}
        while True:
            process = start(output)
            process.join(moments.uniform(0, duration) if kills < KILLS else None)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            now = finished(output)
            assert before.items() <= now.items(), "a finished sample was lost or made again"
            made = contents(output)
            assert all(made[name] == expected[name] for name in now if name in expected), "a half-written one passes"
            before = now
        assert contents(output) == expected
        assert not list(output.rglob(".partial*"))
        shutil.rmtree(output)


def test_both_models_are_sampled_and_scored_alike(magi_folder, tmp_path):
    methods = {"exact": {}, "flowcache": {"cache": {"alpha": 1.0}}}
    experiment = write_experiment(tmp_path / "job", magi_folder, methods, "magi1")
    output = tmp_path / "out"
    assert sample.main([str(experiment), "--output", str(output), "--prompts", "1"]) == 0
    assert score.main([str(output)]) == 0
    (summary,), (exact,) = summaries(output, "flowcache"), summaries(output, "exact")
    assert 0 < summary["tokens_computed"] < summary["tokens_total"] == exact["tokens_computed"]
    (scores,) = [json.loads(f.read_text()) for f in output.glob("flowcache/*.scores.json")]
    assert scores["fingerprint"] == summary["fingerprint"] and scores["reference"] == exact["fingerprint"]
    assert 0 < scores["psnr_db"] < 100 and 0 < scores["ssim"] < 1


class Halves(torch.nn.Module):
    """In place of the learned distance: the mean absolute difference per pixel, halved."""

    def forward(self, a, b):
        assert a.shape == b.shape and a.shape[1] == 3 and a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean(1, keepdim=True) / 2


def test_scores_are_made_once_for_the_videos_they_belong_to(output, monkeypatch, capsys):
    monkeypatch.setattr(score.metrics, "has_lpips", lambda: False)
    assert score.main([str(output)]) == 0
    assert "LPIPS is left out" in capsys.readouterr().out
    files = sorted(output.glob("*/*.scores.json"))
    assert [file.parent.name for file in files] == ["motioncache", "motioncache", "stock", "stock"]
    cached, _, stock, _ = (json.loads(file.read_text()) for file in files)
    assert cached["psnr_db"] < stock["psnr_db"] and stock["ssim"] > 0.99 and cached["lpips"] is None
    before = {file: file.stat().st_mtime_ns for file in files}

    def scored_again():
        assert score.main([str(output)]) == 0
        return [file for file in files if file.stat().st_mtime_ns != before[file]]

    assert scored_again() == []
    summary = files[0].with_name(files[0].name.replace(".scores.json", ".json"))
    summary.write_text(summary.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert scored_again() == files[:1]


def test_lpips_is_added_to_scores_that_lack_it(output, monkeypatch, capsys):
    assert score.main([str(output), "--no-lpips"]) == 0
    assert "LPIPS" not in capsys.readouterr().out
    monkeypatch.setattr(score.metrics, "has_lpips", lambda: True)
    monkeypatch.setattr(score.metrics, "load_lpips", lambda device: Halves())
    assert score.main([str(output)]) == 0
    for file in output.glob("motioncache/*.scores.json"):
        stem = file.name.removesuffix(".scores.json")
        video, exact = (read_video(output / name / f"{stem}.mkv").astype(float) for name in ("motioncache", "exact"))
        assert json.loads(file.read_text())["lpips"] == pytest.approx(np.abs(video - exact).mean() / 255, rel=1e-4)


def test_scoring_in_two_processes_gives_the_same(output, undisturbed, forkserver):
    assert score.main([str(output), "--no-lpips", "--processes", "2"]) == 0
    found = {file.name: json.loads(file.read_text()) for file in output.glob("motioncache/*.scores.json")}
    assert len(found) == 2
    for name, scores in found.items():
        stem = name.removesuffix(".scores.json")
        video, exact = (read_video(output / method / f"{stem}.mkv") for method in ("motioncache", "exact"))
        assert {**scores, **score.score(video, exact, None)} == scores


def test_what_cannot_be_scored_is_said(output, tmp_path, capsys):
    assert score.main([str(tmp_path / "nowhere")]) == 2
    assert "holds no samples" in capsys.readouterr().err
    for file in (output / "exact").glob("0000*.json"):
        file.unlink()
    assert score.main([str(output), "--no-lpips"]) == 0
    assert "2 samples have no exact one" in " ".join(capsys.readouterr().out.split())
    assert len(list(output.glob("*/*.scores.json"))) == 2


@pytest.mark.skipif(score.metrics.has_lpips(), reason="LPIPS is installed")
def test_lpips_that_is_asked_for_and_missing_names_the_command(output, capsys):
    assert score.main([str(output), "--lpips"]) == 2
    assert "pip install -r requirements-lpips.txt" in capsys.readouterr().err
