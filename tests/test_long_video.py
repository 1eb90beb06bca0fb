"""Long videos: chunks from exact's history are what they are said to be, and memory is counted per length."""

import json

import numpy as np
import pytest
import torch
import yaml
from sampling_jobs import write_experiment

from benchmarks import figures, kv_memory, long_video
from benchmarks.experiment import Experiment
from benchmarks.histories import LONG_VIDEOS, CachesSome
from benchmarks.subject import EXACT, family_of, load_subject
from common.errors import UserError

METHODS = {
    "exact": {},
    "best": {"cache": {"alpha": 1.0, "threshold": 0.3, "grading": 0.5, "extrapolation": "logsnr"}},
    "flowcache": {"cache": {"alpha": 1.0, "threshold": 0.5}},
    "tokens": {"cache": {"min_update_share": 0.0}},
}
SIZES = {
    "skyreels_v2": {"num_frames": 21, "base_num_frames": 21, "overlap_history": 9, "steps": 4, "ar_step": 1},
    "magi1": {"num_frames": 16, "steps": 8},
}
FOLDERS = {"skyreels_v2": "tiny_pipeline_folder", "magi1": "magi_folder"}
CHUNKS = {"skyreels_v2": 4, "magi1": 6}
PROMPT = "a red circle moving left"


@pytest.fixture(params=list(SIZES))
def family(request):
    return request.param


@pytest.fixture
def experiment(family, request, tmp_path):
    """An experiment file on a small random model."""
    checkpoint = request.getfixturevalue(FOLDERS[family])
    return write_experiment(tmp_path / "job", checkpoint, METHODS, family, **SIZES[family])


@pytest.fixture
def video(family, experiment):
    """The model with settings of a long video, and the experiment's methods."""
    loaded = Experiment.load(experiment)
    kind = LONG_VIDEOS[family_of(loaded.config)]
    options = kind.options(loaded.settings, CHUNKS[family])
    made = kind(load_subject(loaded.config, options=options))
    return made, {name: method.cache for name, method in loaded.methods.items()}


def chunk_of(long, latents, number):
    return latents[:, :, number * long.block : (number + 1) * long.block]


def assert_same(a, b):
    assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


def test_chunks_given_exacts_history(video, family):
    long, methods = video
    generator = long.subject.generator(PROMPT, 3)
    always = methods["best"].replace(threshold=0.0)
    exact, given = long.exact_and_given(generator, {"always": always, "best": methods["best"]})
    assert_same(long.make(generator, EXACT).latents, exact.latents)
    assert_same(given["always"].latents, exact.latents)

    last = CHUNKS[family] - 1
    window = exact.trace.records[-1].window

    def in_last(step):  # the last window of SkyReels-V2, the last chunk of MAGI-1
        return step.window == window and (window > 0 or step.chunk == last)

    # A video that is exact up to there has exact's history there, and is cached by the same decisions.
    alone = long.make(generator, methods["best"], CachesSome(methods["best"], in_last))
    own = long.make(generator, methods["best"])
    assert_same(chunk_of(long, given["best"].latents, 0), chunk_of(long, own.latents, 0))
    rounding, *others = (
        float((chunk_of(long, given["best"].latents, last) - chunk_of(long, other.latents, last)).abs().max())
        for other in (alone, exact, own)
    )
    assert all(rounding < 0.1 * other for other in others)
    assert generator.pipe.__dict__.get("prepare_latents") is None, "the pipeline is as it was"


def test_cached_in_the_first_window_alone(video):
    long, methods = video
    generator = long.subject.generator(PROMPT, 3)
    own, first = long.make(generator, methods["best"]), long.make_first(generator, methods["best"])
    shares = long_video.shares_by_chunk(first.trace, long)
    assert shares[: long.at_once] == long_video.shares_by_chunk(own.trace, long)[: long.at_once]
    assert max(shares[: long.at_once]) < 1 and set(shares[long.at_once :]) == {1.0}
    frames = long.at_once * long.block
    assert_same(first.latents[:, :, :frames], own.latents[:, :, :frames])
    assert not torch.allclose(first.latents[:, :, frames:], own.latents[:, :, frames:])


def test_scores_belong_to_their_chunk(video, family):
    long, _ = video
    generator = long.subject.generator(PROMPT, 3)
    latents = torch.randn(1, long.subject.pipe.transformer.config.in_channels, 4 * long.block, 4, 4)
    frames = 4 * long.block * long.factor - (long.factor - 1 if family == "skyreels_v2" else 0)
    assert len(generator.decode(latents)) == frames
    reference = np.zeros((frames, 16, 16, 3), np.uint8)
    disturbed = reference.copy()
    disturbed[-2 * long.block * long.factor : -long.block * long.factor] = 255
    scores = long_video.scores_by_chunk(disturbed, reference, 4, long)
    assert scores["psnr_db"] == [100, 100, 0, 100]
    assert scores["ssim"][0] == 1 and scores["ssim"][2] < 0.1


def test_the_command_makes_each_prompt_once(experiment, family, tmp_path, monkeypatch):
    output = tmp_path / "long.json"
    arguments = [str(experiment), "--methods", "best", "flowcache", "--chunks", str(CHUNKS[family])]
    arguments += ["--parts", str(tmp_path / "parts"), "--output", str(output)]
    assert long_video.main([*arguments, "--prompts", "1"]) == 0
    alone = json.loads(output.read_text())["rows"]
    made = []
    measure = long_video.measure
    monkeypatch.setattr(long_video, "measure", lambda *given: made.append(given[1].index) or measure(*given))
    assert long_video.main(arguments) == 0
    assert made == [1]
    data = json.loads(output.read_text())
    assert data["chunks"] == CHUNKS[family] and data["command"].startswith("python -m benchmarks.long_video")
    histories = [(row["method"], row["history"]) for row in data["rows"]]
    assert histories == [
        ("best", "own"),
        ("flowcache", "own"),
        ("best", "first window cached"),
        ("best", "exact"),
        ("flowcache", "exact"),
    ]
    for row, before in zip(data["rows"], alone, strict=True):
        assert row["psnr_by_prompt"][0] == before["psnr_db"] and before["psnr_ci95"] is None
        assert {len(row[key]) for key in ("psnr_db", "psnr_ci95", "ssim", "token_share")} == {CHUNKS[family]}
        assert (row["compute_share"] is None) == (row["history"] == "exact")


def test_a_video_that_is_not_long_is_refused_before_it_is_made(experiment, tmp_path, capsys):
    arguments = [str(experiment), "--methods", "best", "--chunks", "3"]
    folders = ["--parts", str(tmp_path / "parts"), "--output", str(tmp_path / "long.json")]
    assert long_video.main([*arguments, *folders]) == 2
    assert "--chunks 3 leaves nothing to compare after a first window of" in capsys.readouterr().err


def test_rows_have_intervals_over_prompts():
    def part(*psnr):
        run = {"method": "best", "history": "own", "compute_share": 0.25, "psnr_db": psnr}
        return {"runs": [{**run, "ssim": [0.9] * 4, "token_share": [0.5, 0.5, 0.3, 0.3]}]}

    (row,) = long_video.rows_of([part(99, 40, 40, 30, 30), part(99, 42, 42, 34, 34)], first=1)
    assert row["psnr_db"] == [99, 41, 41, 32, 32]
    half_widths = [0, 12.706, 12.706, 25.412, 25.412]  # t of one degree of freedom
    assert row["psnr_ci95"] == pytest.approx(half_widths, abs=1e-3)
    assert row["drift_db"] == -9 and row["drift_ci95"] == pytest.approx(12.706, abs=1e-3)
    assert row["token_share"] == [0.5, 0.5, 0.3, 0.3] and row["compute_share"] == 0.25


@pytest.mark.parametrize(
    ("methods", "prompts", "message"),
    [
        (["bset"], 1, "--methods 'bset'.*best"),
        (["exact"], 1, "--methods 'exact' does not decide chunk by chunk"),
        (["tokens"], 1, "--methods 'tokens' selects tokens"),
        (["best"], 3, "--prompts 3 is not allowed.*has 2"),
    ],
)
def test_what_cannot_be_asked_for(experiment, tmp_path, methods, prompts, message):
    with pytest.raises(UserError, match=message):
        long_video.plan_work(experiment, methods, 4, prompts, tmp_path)


def test_memory_over_length(family, experiment, tmp_path, monkeypatch):
    config = experiment.with_name("small_slow.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["cache"] |= {"alpha": 1.0, "warmup_steps": 1}
    config.write_text(yaml.safe_dump(settings))
    output = tmp_path / "memory.json"
    arguments = ["--config", str(config), "--chunks", "6", "10", "--kv-budget", "1"]
    arguments += ["--parts", str(tmp_path / "parts"), "--output", str(output)]
    assert kv_memory.main(arguments) == 0
    rows = {(row["way"], row["chunks"]): row for row in json.loads(output.read_text())["rows"]}
    bounded = LONG_VIDEOS[family_of(config)].bounded
    assert rows["all kept", 10]["kv_bytes"] > 1.3 * rows["all kept", 6]["kv_bytes"]
    for way in (bounded, "budget 1"):
        assert rows[way, 10]["kv_bytes"] == rows[way, 6]["kv_bytes"] < rows["all kept", 6]["kv_bytes"]
        assert rows[way, 10]["kv_chunks"] < rows["all kept", 10]["kv_chunks"] == 10
    assert rows["all kept", 10]["values_bytes"] == rows["all kept", 6]["values_bytes"]
    assert 0 < rows["budget 1", 6]["psnr_db"] < 100 and rows[bounded, 6]["psnr_db"] is None
    monkeypatch.delattr(kv_memory, "measure")  # the second time there is nothing to make
    assert kv_memory.main(arguments) == 0


# -- what is made of the figures ---------------------------------------------------------------------------------------

HEAD = {
    **{"command": "python -m ...", "date": "2026-01-01", "device": "CPU", "commit": "0" * 40 + "-dirty"},
    "versions": {"torch": "2", "diffusers": "0"},
}


@pytest.fixture
def measured():
    """A result file of two prompts: three ways, four chunks."""
    ways = {("best-matched@0.3", "own"): 30, ("best-matched@0.3", "first window cached"): 32}
    ways |= {("best-matched@0.3", "exact"): 35, ("flowcache-matched@0.3", "exact"): 25}

    def run(way, psnr, prompt):
        (method, history) = way
        row = {"method": method, "history": history, "compute_share": None if history == "exact" else 0.3}
        row["psnr_db"] = [psnr + prompt - chunk for chunk in range(4)]
        return {**row, "ssim": [0.9] * 4, "token_share": [0.5, 0.3, 0.2, 0.2]}

    parts = [{"runs": [run(*way, prompt) for way in ways.items()]} for prompt in range(2)]
    return {**HEAD, "model": "tiny", "chunks": 4, "first_window": 2, "rows": long_video.rows_of(parts, 2)}


def test_long_videos_in_a_document(documents, measured):
    lines = documents.long_video(measured).splitlines()
    assert lines[0].endswith("| chunks 1–2 | chunks 3–3 | chunks 4–4 | later half − earlier |")
    own = "| best-matched@0.3 | its own history | 0.300 | 30.00 | 28.50 | 27.50 | -1.00 ± 0.00 |"
    given = "| flowcache-matched@0.3 | exact's history | – | 25.00 | 23.50 | 22.50 | -1.00 ± 0.00 |"
    assert own in lines and given in lines
    assert "PSNR in dB against exact, mean over chunks and 2 prompts." in lines


def test_long_videos_in_a_figure(measured):
    own, given, tokens = figures.long_video(measured).axes
    names = [axes.get_legend_handles_labels()[1] for axes in (own, given)]
    assert names[0] == ["best-matched@0.3", "best-matched@0.3 in the first window, then exact"]
    assert names[1] == ["best-matched@0.3", "flowcache-matched@0.3"]
    assert list(own.containers[0].lines[0].get_ydata()) == [30.5, 29.5, 28.5, 27.5]
    assert list(tokens.lines[0].get_ydata()) == [0.5, 0.3, 0.2, 0.2]


def test_memory_in_a_document(documents):
    def row(way, chunks, kv, psnr):
        return {"model": "tiny", "way": way, "chunks": chunks, "kv_bytes": kv, "values_bytes": 2000, "psnr_db": psnr}

    rows = [row("all kept", 4, 1e6, None), row("budget 2", 4, 5e5, 30.0)]
    rows += [row("all kept", 16, 4e6, None), row("budget 2", 16, 5e5, 25.0)]
    lines = documents.kv_memory({**HEAD, "rows": rows}).splitlines()
    assert any(line.endswith(" · commit 0000000-dirty") for line in lines)
    assert "| model | K/V | 4 chunks | 16 chunks | reused values | PSNR to all kept, dB |" in lines
    assert "| tiny | all kept | 1.0 MB | 4.0 MB | 2.0 kB / 2.0 kB | – / – |" in lines
    assert "| tiny | budget 2 | 500.0 kB | 500.0 kB | 2.0 kB / 2.0 kB | 30.0 / 25.0 |" in lines
