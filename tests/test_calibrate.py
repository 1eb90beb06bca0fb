"""Thresholds are found in few runs and reach their targets; nothing is run twice."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from benchmarks import calibrate, match, thresholds
from benchmarks.runs import Runs, savings, skip_errors, token_savings
from benchmarks.search import Target, search
from benchmarks.subject import EXACT, load_settings, load_subject, sample
from benchmarks.takes import Take, TakeSets
from benchmarks.thresholds import tell_threshold
from common.cache import ChunkStep, MotionCacheConfig, Signals
from common.cache.calibration import (
    ChangeRecorder,
    StepChange,
    StepSkipper,
    distance_table,
    fit_polynomial,
    sensitivity_table,
)
from common.cache.foretell import foretell, is_foretellable
from common.console import Reporter
from common.errors import UserError
from common.settings import CONFIGS

STEPS = 8
TABLE = (0.0, 0.3, 0.2, 0.1, 0.1, 0.2, 0.1, 0.3)
PER_CHUNK = {"alpha": 1.0, "distance": "table", "distance_table": TABLE}
TAKE = Take("a red circle moving left", 3)
SIZES = {"height": 32, "width": 32, "steps": STEPS}
CASES = {
    "skyreels_v2": ("tiny_pipeline_folder", {"num_frames": 9, "ar_step": 3}),
    "magi1": ("magi_folder", {"num_frames": 16, "sampling": {"noise2clean_kvrange": [], "window_size": 2}}),
}


def make_config(family, request, folder):
    """A config of a small random model, in the form of the shipped ones."""
    checkpoint, changes = CASES[family]
    settings = yaml.safe_load((CONFIGS / f"{family}_tiny_slow.yaml").read_text())
    settings |= {**SIZES, **changes, "model": str(request.getfixturevalue(checkpoint))}
    settings["cache"] |= {"warmup_steps": 2, "chunk_phase": 1, "distance": "input", "distance_table": None}
    path = folder / f"{family}_small_slow.yaml"
    path.write_text(
        "# A small model.\n" + yaml.safe_dump(settings, sort_keys=False).replace("alpha: 0.6", "alpha: 0.6  # least")
    )
    return path


@pytest.fixture(params=list(CASES))
def config(request, tmp_path):
    return make_config(request.param, request, tmp_path)


# -- what is measured on exact runs --------------------------------------------------------------------------------


def call(recorder, step, value, branch="cond", modulation=None):
    inputs = torch.zeros(1, 4, 2)
    signals = Signals(inputs, modulation)
    chunk_step = ChunkStep(0, step, 0, branch, step, STEPS, 0.5, (1, 2, 2), 4)
    recorder.observe(chunk_step, None, None, signals, torch.full_like(inputs, value))


def test_changes_of_a_pass_that_skips_steps_are_spread_over_them():
    recorder = ChangeRecorder()
    for step, value in enumerate([1.0, 2.0, 3.0, 6.0, 6.0, 6.0, 6.0, 6.0]):
        call(recorder, step, value)
    call(recorder, 1, 2.0, "uncond")
    call(recorder, 3, 6.0, "uncond")
    assert [(c.step, c.steps) for c in recorder.samples] == [*((k, 1) for k in range(1, 8)), (3, 2)]
    # The pass that skips step 2 triples over two steps: 2 / 1 twice.
    assert distance_table(recorder.samples, STEPS) == pytest.approx([0, 1, 0.75, 1, 0, 0, 0, 0])
    assert recorder.samples[0].modulation is None
    with pytest.raises(ValueError, match="time modulation"):
        fit_polynomial(recorder.samples)


def test_a_step_without_samples_is_refused():
    with pytest.raises(ValueError, match=r"steps \[2\]"):
        distance_table([StepChange(1, 1, 0.1, 0.1, None), StepChange(3, 1, 0.1, 0.1, None)], 4)


def test_polynomial_of_the_modulation():
    samples = [StepChange(1, 1, 2 * x * x + 1, 0.0, x) for x in np.linspace(0, 1, 9)]
    assert fit_polynomial(samples, degree=2) == pytest.approx([2, 0, 1], abs=1e-9)


def test_sensitivity_is_the_cube_root_of_the_mean_error():
    assert sensitivity_table([[0.0, 0.008, 0.5], [0.0, 0.046, 0.5]]) == pytest.approx([0, 0.3, 0.7937], abs=1e-4)


def test_each_step_left_out_is_that_of_the_first_chunk(config):
    two_chunks = {"num_frames": 21} if "skyreels" in config.name else {}
    subject = load_subject(config, options=two_chunks)
    cache = MotionCacheConfig(distance="input", alpha=1.0, extrapolation="logsnr")
    generator = subject.generator(*TAKE)
    handle = generator.attach(cache, keep_maps=False, policy=StepSkipper(5))
    try:
        latents = generator.run(stop_after=STEPS + 1).latents
    finally:
        generator.detach()
    decided = {(r.chunk, r.step): r.decision for r in handle.trace.records if r.role == "denoise"}
    reused = {place for place, decision in decided.items() if decision == "reuse"}
    assert {step for chunk, step in reused if chunk == 0} == {5}
    assert {step for chunk, step in decided if chunk == 1 and (chunk, step) not in reused} == {0}
    # The chunk is finished, and as it would be in a whole video.
    generator.attach(EXACT, keep_maps=False)
    try:
        exact = generator.run().latents
    finally:
        generator.detach()
    errors = skip_errors(generator, cache)
    frames = exact.shape[2] // (1 + max(chunk for chunk, _ in decided))
    difference = (latents[:, :, :frames] - exact[:, :, :frames]).square().mean().sqrt()
    assert errors[5] == pytest.approx(float(difference), rel=1e-3) and errors[0] == 0.0
    assert len(errors) == STEPS and all(error > 0 for error in errors[1:])


# -- foretelling, on both models -----------------------------------------------------------------------------------


def decisions(records):
    return [(r.iteration, r.chunk, r.branch, r.step, r.role, r.decision, r.tokens) for r in records]


def test_foretold_decisions_and_flops_are_those_of_a_run(config):
    subject = load_subject(config)
    generator = subject.generator(*TAKE)
    exact = sample(generator, EXACT, decode=False)
    saving, per_token = savings(generator, exact.trace), token_savings(generator, exact.trace)
    for threshold in (0.25, 0.35):
        cache = subject.settings.cache.replace(**PER_CHUNK, threshold=threshold)
        told = foretell(exact.trace.records, cache)
        made = sample(generator, cache, decode=False)
        assert decisions(told) == decisions(made.trace.records)
        triples = zip(saving, per_token, told, strict=True)
        flops = exact.flops - sum(s if not r.tokens else p * (r.tokens_total - r.tokens) for s, p, r in triples)
        assert flops == pytest.approx(made.flops) and 0.2 < made.share < 0.9


def test_what_depends_on_the_video_is_not_foretold():
    per_chunk = MotionCacheConfig(**PER_CHUNK)
    assert is_foretellable(per_chunk)
    for changes in ({"alpha": 0.6}, {"distance": "input"}, {"kv_budget": 2}, {"method": "teacache"}):
        assert not is_foretellable(per_chunk.replace(**changes))
    with pytest.raises(ValueError, match="not known before a run"):
        foretell([], per_chunk.replace(alpha=0.6))


def test_told_threshold_is_the_nearest_to_a_share(tmp_path, request):
    path = make_config("skyreels_v2", request, tmp_path)
    with open_runs(path, tmp_path) as runs:
        cache = runs.settings.cache.replace(**PER_CHUNK)
        told = tell_threshold(runs, cache, Target("share", 0.55), TAKE)
        shares = [runs.foretold_share(cache.replace(threshold=t), TAKE) for t in np.geomspace(0.02, 2, 100)]
        assert abs(told.share - 0.55) == pytest.approx(min(abs(share - 0.55) for share in shares))
        made = runs.point(cache.replace(threshold=told.threshold), [TAKE], frames=False)
        assert made.share == pytest.approx(told.share)


# -- runs are made once --------------------------------------------------------------------------------------------


def open_runs(path, folder, weights="w", load=None, processes=1):
    load, ledger = load or functools.partial(load_subject, path), folder / f"runs{processes}.jsonl"
    return Runs(load, load_settings(path), weights, ledger, Reporter(Console(quiet=True)), processes)


def refuse():
    raise AssertionError("nothing was left to run")


def test_finished_runs_are_not_made_again(tmp_path, request):
    path = make_config("skyreels_v2", request, tmp_path)
    with open_runs(path, tmp_path) as runs:
        cache = runs.settings.cache.replace(threshold=0.5)
        point = runs.point(cache, [TAKE], frames=True)
        assert 0 < point.share < 1 and 5 < point.psnr_db < 100
        assert list(runs.references.glob("*.npy"))
        runs.forget_references()
        assert not runs.references.exists()
    ledger = tmp_path / "runs1.jsonl"
    ledger.write_text(ledger.read_text() + '{"key": "cut sh')  # killed while writing
    with open_runs(path, tmp_path, load=refuse) as again:
        assert again.point(cache, [TAKE], frames=True) == point
        for other in (cache.replace(threshold=0.6), cache.replace(alpha=0.1)):
            with pytest.raises(AssertionError, match="nothing was left"):
                again.point(other, [TAKE], frames=True)
    with (
        open_runs(path, tmp_path, weights="retrained", load=refuse) as other,
        pytest.raises(AssertionError, match="nothing was left"),
    ):
        other.point(cache, [TAKE], frames=True)
    lines = ledger.read_text().splitlines()
    with open_runs(path, tmp_path) as more:  # the exact frames were deleted and are made again
        more.point(cache.replace(threshold=0.6), [TAKE], frames=True)
    added = ledger.read_text().splitlines()[len(lines) :]
    assert [json.loads(line)["kind"] for line in added] == ["exact", "cached"]


def test_several_processes_find_what_one_finds(tmp_path, request):
    path = make_config("skyreels_v2", request, tmp_path)
    takes, found = [TAKE, Take("a blue star", 4)], []
    for processes in (1, 2):
        with open_runs(path, tmp_path, processes=processes) as runs:
            point = runs.point(runs.settings.cache.replace(threshold=0.5), takes, frames=True)
            found.append(dataclasses.replace(point, speedup=None))
    assert found[0] == found[1] and found[0].prompts == 2


# -- the commands, on both models ----------------------------------------------------------------------------------


def arguments(config, output, target, *more):
    return ["--config", str(config), "--output", str(output), "--target", target, "--prompts", "1", *more]


@pytest.mark.parametrize("distance", ["table", "sensitivity"])
def test_calibrate_writes_a_preset_that_reaches_its_target(config, distance, tmp_path):
    output = tmp_path / "found.yaml"
    call = arguments(config, output, "share=0.5", "--distance", distance, "--held-out", "1", "--set", "seed=7")
    code = calibrate.main(call)
    data = json.loads(output.with_suffix(".json").read_text())
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert data["result"]["share"] == pytest.approx(0.5, rel=0.1)
    assert code == (0 if data["reached"] else 1)
    assert data["reached"] == (abs(data["held_out"]["share"] - 0.5) <= 0.025)
    text = output.read_text()
    assert (
        text.startswith("# Calibrated to share=0.5: compute 0.") and "# A small model." in text and "  # least" in text
    )
    settings = load_settings(output)
    assert settings.seed == 7 and settings.cache.to_dict() == data["cache"]
    assert settings.cache.distance == "table" and len(settings.cache.distance_table) == STEPS
    assert settings.cache.threshold == data["result"]["threshold"]
    measured = sample(load_subject(output).generator(*TakeSets.load(1).choosing[0]), settings.cache, decode=False)
    exact = sample(load_subject(output).generator(*TakeSets.load(1).choosing[0]), EXACT, decode=False)
    assert measured.flops / exact.flops == pytest.approx(data["result"]["share"])


def test_calibrate_goes_on_and_forgets_what_an_old_head_says(tmp_path, request, monkeypatch):
    config, output = make_config("skyreels_v2", request, tmp_path), tmp_path / "found.yaml"
    start = ("--set", "cache.threshold=0.14")  # from which the last search needs no run that the first did not make
    call = arguments(config, output, "psnr=52", "--tune", "chunk_phase", "--method", "motioncache", *start)
    monkeypatch.setattr(thresholds, "CHUNK_PHASES", (0.0,))
    monkeypatch.setattr(thresholds, "search", functools.partial(search, rounds=3))
    calibrate.main(call)
    first = output.read_text()
    curves = json.loads(output.with_suffix(".json").read_text())["curves"]
    assert len({curve["cache"]["chunk_phase"] for curve in curves}) == len(curves) == 2
    assert curves[0]["at_target"] == max(curve["at_target"] for curve in curves)
    monkeypatch.setattr(calibrate, "warm", lambda load: refuse())
    calibrate.main(call)
    assert output.read_text() == first
    again = tmp_path / "again.yaml"
    (tmp_path / "found.runs.jsonl").rename(tmp_path / "again.runs.jsonl")
    calibrate.main(arguments(output, again, "psnr=52"))
    assert again.read_text().count("# Calibrated to") == 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--target", "share=0.05"], "target share=0.05 cannot be reached.* choose share=0."),
        (["--target", "share=2"], "give share=0.01 to share=1"),
        (["--method", "teacache", "--tune", "alpha"], "choose --method motioncache"),
        (["--set", "cache.budget=0.3"], "budget: 0.3 stands in place of the threshold"),
        (["--preset", "exact"], "has no threshold to find"),
        (["--target", "speedup=2", "--processes", "2"], "1 to measure a speedup"),
        (["--output", "found.json"], "ends in .yaml"),
        (["--prompts-file", "nowhere.txt"], "cannot be read"),
    ],
)
def test_calibrate_complains_in_one_line(more, complaint, tmp_path, request, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("skyreels_v2", request, tmp_path)
    (tmp_path / "skyreels_v2_small_exact.yaml").write_text(
        config.read_text().replace("method: motioncache", "method: exact")
    )
    capsys.readouterr()  # bars of what wrote the model
    code = calibrate.main([*arguments(config, tmp_path / "found.yaml", "share=0.5"), *more])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and re.search(complaint, error), error
    assert not (tmp_path / "found.yaml").exists()


def test_magi_has_no_modulation_to_calibrate(tmp_path, request, capsys):
    config = make_config("magi1", request, tmp_path)
    code = calibrate.main(arguments(config, tmp_path / "found.yaml", "share=0.5", "--distance", "modulation"))
    assert code == 2 and "no time modulation" in capsys.readouterr().err


def test_held_out_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\nthree\n")
    sets = TakeSets.load(2, 1, file)
    assert [take.prompt for take in sets.choosing] == ["one", "two"] and sets.held_out[0].prompt == "three"
    with pytest.raises(UserError, match="has 3 prompts, and 4 are asked for"):
        TakeSets.load(2, 2, file)
    own = TakeSets.load(8, 8)
    assert len({take.prompt for part in dataclasses.astuple(own) for take in map(Take._make, part)}) == 24


EXPERIMENT = """# What is compared.
config: {config}
prompts: {{split: reporting, count: 2}}
methods:
  exact: {{}}
  motioncache-slow: {{preset: slow}}  # not matched
  "flow@0.6": {{cache: {{threshold: 0.1, alpha: 1, distance: table, distance_table: [0, 0.1]}}}}
  "flow@0.4": {{cache: {{threshold: 0.1, alpha: 1, distance: table, distance_table: [0, 0.1]}}}}
  "tea@0.5": {{cache: {{threshold: 0.3, method: teacache}}}}
  "motion@0.5":  # tokens
    cache:
      threshold: 0.1
"""


def test_match_rewrites_thresholds_and_tables(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(thresholds, "search", functools.partial(search, rounds=4))
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.format(config=config))
    call = [str(path), "--prompts", "1", "--ledger", str(tmp_path / "runs.jsonl"), "--processes", "1"]
    assert match.main(call) == 0, capsys.readouterr().err
    text, methods = path.read_text(), yaml.safe_load(path.read_text())["methods"]
    assert text.startswith("# What is compared.") and "  # not matched" in text and ":  # tokens" in text
    assert text.count("&measured") == 1 and text.count("*measured") == 1
    assert methods["motioncache-slow"] == {"preset": "slow"}
    tables = [methods[name]["cache"]["distance_table"] for name in ("flow@0.6", "flow@0.4")]
    assert tables[0] == tables[1] and len(tables[0]) == STEPS
    assert methods["flow@0.6"]["cache"]["threshold"] < methods["flow@0.4"]["cache"]["threshold"]
    with open_runs(config, tmp_path) as runs:
        takes = TakeSets.load(1).choosing
        for name, given in methods.items():
            if "@" not in name:
                continue
            cache = load_settings(config, options={f"cache.{k}": v for k, v in given["cache"].items()}).cache
            share = runs.point(cache, takes, frames=False).share
            assert share == pytest.approx(float(name.partition("@")[2]), abs=0.13), name  # 8 steps: coarse


@pytest.mark.parametrize(
    ("methods", "complaint"),
    [
        ({"motion": {}}, "no method named KIND@SHARE"),
        ({"motion@3": {}}, "method 'motion@3': target 'share=3' is not allowed"),
        ({"same@0.5": {"preset": "exact"}}, "method 'same@0.5': method: 'exact' has no threshold"),
        ({"motion@0.05": {}}, "method 'motion@0.05': target share=0.05 cannot be reached"),
    ],
)
def test_match_complains_in_one_line(methods, complaint, tmp_path, request, capsys):
    path = tmp_path / "experiment.yaml"
    config = make_config("skyreels_v2", request, tmp_path)
    prompts = {"split": "reporting", "count": 1}
    path.write_text(yaml.safe_dump({"config": str(config), "prompts": prompts, "methods": {"exact": {}, **methods}}))
    before = path.read_text()
    code = match.main([str(path), "--prompts", "1", "--ledger", str(tmp_path / "runs.jsonl")])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and complaint in error, error
    assert path.read_text() == before
