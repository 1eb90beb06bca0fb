"""TeaCache: one decision for all active chunks, made as its rule says, on a stand-in and on both models."""

from collections import defaultdict

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import LONG, random_pipeline

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from common.errors import UserError
from magi1_motioncache.attach import apply_motioncache as attach_magi
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache

TEACACHE = MotionCacheConfig(method="teacache", distance="input", threshold=0.25, warmup_steps=2)
GRID, TOKENS, STEPS = (1, 2, 2), 4, 10


def drive(config: MotionCacheConfig, lag: int = 3):
    """Two chunks, the second `lag` iterations later. Decisions by iteration and chunk, and inputs."""
    engine = Engine(config)
    engine.start_window()
    torch.manual_seed(0)
    inputs = {(i, c): torch.randn(1, TOKENS, 3) * 0.03 + 1 + 0.1 * i for i in range(STEPS + lag) for c in range(2)}
    decisions = {}
    for iteration in range(STEPS + lag):
        active = [c for c in range(2) if 0 <= iteration - c * lag < STEPS]
        steps = {}
        for c in active:
            step = iteration - c * lag
            sigma = 1 - (step + 0.5) / STEPS
            steps[c] = ChunkStep(0, iteration, c, "cond", step, STEPS, sigma, GRID, TOKENS * (c + 1))
        engine.announce([(steps[c], Signals(inputs[iteration, c])) for c in active], "cond")
        for c in active:
            x = inputs[iteration, c]
            engine.run_blocks(steps[c], Signals(x), lambda v, _: v * 2)
            engine.finish(x)
            decisions[iteration, c] = engine.trace.records[-1].decision
    return decisions, inputs


def by_the_rule(inputs, active, threshold, warmup):
    """TeaCache's rule computed directly: which iterations are computed."""
    computed, total, before = [], 0.0, {}
    for iteration, chunks in enumerate(active):
        both = [c for c in chunks if c in before]
        if both:
            now, last = (
                torch.cat([source[c] for c in both]) for source in ({c: inputs[iteration, c] for c in both}, before)
            )
            total += float((now - last).abs().mean() / last.abs().mean())
        before = {c: inputs[iteration, c] for c in chunks}
        if iteration < warmup or total >= threshold:
            computed.append(iteration)
            total = 0.0
    return computed


def test_decisions_follow_the_rule():
    decisions, inputs = drive(TEACACHE)
    active = [[c for c in range(2) if (i, c) in decisions] for i in range(STEPS + 3)]
    computed = by_the_rule(inputs, active, 0.25, 2)
    assert 3 < len(computed) < STEPS
    for (iteration, chunk), decision in decisions.items():
        begins = (iteration, chunk) == (3, 1)
        assert decision == ("full" if iteration in computed or begins else "reuse")
    assert 3 not in computed  # the second chunk had nothing to reuse and was computed by itself


def test_a_new_window_starts_anew():
    engine = Engine(TEACACHE.replace(warmup_steps=1, threshold=100.0))
    for _ in range(2):
        engine.start_window()
        for i in range(3):
            step = ChunkStep(0, i, 0, "cond", i, 3, 0.5, GRID, TOKENS)
            engine.announce([(step, Signals(torch.ones(1, TOKENS, 3)))], "cond")
            engine.run_blocks(step, Signals(torch.ones(1, TOKENS, 3)), lambda v, _: v)
            engine.finish(torch.ones(1, TOKENS, 3))
    assert [r.decision for r in engine.trace.records] == ["full", "reuse", "reuse"] * 2


def test_a_table_is_averaged_over_the_active_chunks():
    table = (0.0, *[0.1] * (STEPS - 1))
    decisions, _ = drive(TEACACHE.replace(distance="table", distance_table=table), lag=STEPS)
    assert [decisions[i, 0] for i in range(6)] == ["full", "full", "reuse", "reuse", "full", "reuse"]


def test_a_budget_is_refused():
    with pytest.raises(UserError, match="set threshold"):
        TEACACHE.replace(budget=0.5)


# -- the models --------------------------------------------------------------------------------------------------------


def skyreels(config: MotionCacheConfig, **options):
    pipe, call = random_pipeline(layers=2)
    handle = apply_motioncache(pipe, config)
    latents = call(**options)
    remove_motioncache(pipe)
    return latents, handle.trace


def magi(config: MotionCacheConfig, **sampling):
    pipe = make_magi_pipeline(**sampling)
    pipe.set_progress_bar_config(disable=True)
    handle = attach_magi(pipe, config)
    size = {"height": 32, "width": 32, "num_frames": 32, "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", output_type="latent", **size).frames, handle.trace


def decided_together(trace) -> set[frozenset[str]]:
    """What was decided in an iteration by chunks that had something to reuse; one entry per distinct answer."""
    by_iteration, seen = defaultdict(set), set()
    for r in trace.records:
        if r.role == "denoise":
            if (r.window, r.chunk, r.branch) in seen:
                by_iteration[r.window, r.iteration, r.branch].add(r.decision)
            seen.add((r.window, r.chunk, r.branch))
    return {frozenset(answers) for answers in by_iteration.values()}


TABLE = (0.0, 0.05, 0.2, 0.1, 0.1, 0.3, 0.1, 0.2)
DISTANCES = [
    {"distance": "modulation", "polynomial": (1.0, 0.0), "threshold": 0.6},
    {"distance": "input", "threshold": 0.5},
    {"distance": "table", "distance_table": TABLE, "threshold": 0.25},
]


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d["distance"])
@pytest.mark.parametrize("reuse", ["residual", "velocity"])
def test_skyreels_chunks_decide_together(distance, reuse):
    latents, trace = skyreels(TEACACHE.replace(**distance, reuse=reuse), **LONG)
    assert torch.isfinite(latents).all()
    assert decided_together(trace) == {frozenset(["full"]), frozenset(["reuse"])}
    branches = [[r.decision for r in trace.records if r.branch == name] for name in ("cond", "uncond")]
    assert branches[0] == branches[1]


@pytest.mark.parametrize("sampling", [{"cfg_number": 1}, {"cfg_number": 3}], ids=str)
@pytest.mark.parametrize("distance", DISTANCES[1:], ids=lambda d: d["distance"])
def test_magi_chunks_decide_together(sampling, distance):
    config = TEACACHE.replace(**distance, reuse="velocity").replace(threshold=0.3)
    latents, trace = magi(config, **sampling)
    assert torch.isfinite(latents).all()
    assert decided_together(trace) == {frozenset(["full"]), frozenset(["reuse"])}


@pytest.mark.parametrize("run", [skyreels, magi])
@pytest.mark.parametrize("changes", [{}, {"extrapolation": "logsnr"}, {"reuse": "velocity"}], ids=str)
def test_computing_always_equals_exact(run, changes):
    exact, _ = run(MotionCacheConfig.preset("exact"))
    ours, trace = run(TEACACHE.replace(threshold=0.0, **changes))
    assert {r.decision for r in trace.records} == {"full"}
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


def test_extrapolation_changes_what_is_reused_and_not_what_is_decided():
    table = {"distance": "table", "distance_table": TABLE}
    held, one = skyreels(TEACACHE.replace(**table))
    extended, two = skyreels(TEACACHE.replace(**table, extrapolation="logsnr"))
    assert [r.decision for r in one.records] == [r.decision for r in two.records]
    assert not torch.equal(held, extended)
    assert 1.5 * one.peak_bytes["values"] < two.peak_bytes["values"] <= 2 * one.peak_bytes["values"]
