"""MAGI-1 through the caching engine: exact when everything is computed, and sound when it is not."""

from collections import Counter

import pytest
import torch

from common.cache import MotionCacheConfig
from common.errors import UserError
from magi1_motioncache.adapter import CachedDenoiser
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.kv_cache import LayerView
from magi1_motioncache.sampler import Magi1Sampler
from tests.magi_cases import Case, cases, tensors

RUNS = cases("run")
CACHED = MotionCacheConfig(
    distance="input",
    polynomial=None,
    warmup_steps=2,
    chunk_phase=4,
    chunk_phase_unit="steps",
    score="latent_motion",
    reuse="velocity",
    budget=0.5,
)


def sample(case: Case, denoiser: ExactDenoiser) -> torch.Tensor:
    """Final latents of a recorded run's settings."""
    noise = tensors("noise")[case.parameters["noise_key"]].float()
    sampler = Magi1Sampler(case.plan, noise, case.prefix)
    for _ in sampler.run(denoiser):
        pass
    return sampler.latents


def cached(case: Case, config: MotionCacheConfig) -> CachedDenoiser:
    return CachedDenoiser(case.transformer, case.captions, case.plan, config)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "config",
    [
        MotionCacheConfig.preset("exact"),
        CACHED.replace(budget=1.0),
        CACHED.replace(budget=None, threshold=0.0, reuse="residual", extrapolation="logsnr"),
        CACHED.replace(budget=None, threshold=0.0, reuse="update"),
        CACHED.replace(budget=None, threshold=0.0, method="teacache"),
    ],
    ids=["exact", "budget 1", "threshold 0", "updates", "teacache"],
)
def test_a_policy_that_always_computes_equals_no_engine(name, config):
    case = Case(name)
    reference = sample(case, ExactDenoiser(case.transformer, case.captions, case.plan))
    ours = sample(case, cached(case, config))
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"reuse": "residual"}, {"reuse": "update"}, {"alpha": 1.0}, {"score": "input_change"}],
    ids=str,
)
def test_caching_saves_and_stays_near(name, changes):
    case = Case(name)
    reference = sample(case, ExactDenoiser(case.transformer, case.captions, case.plan))
    denoiser = cached(case, CACHED.replace(**changes))
    ours = sample(case, denoiser)
    totals = denoiser.trace.totals()
    assert totals["tokens_computed"] < 0.8 * totals["tokens_total"]
    assert torch.isfinite(ours).all()
    relative = (ours - reference).norm() / reference.norm()
    assert 0 < relative < 0.5


def test_clean_chunks_are_always_computed_and_copies_decide_for_themselves():
    case = Case(next(n for n in RUNS if "distill" in n and "t2v" in n))
    denoiser = cached(case, CACHED)
    sample(case, denoiser)
    records = denoiser.trace.records
    assert {r.decision for r in records if r.role == "refresh"} == {"full"}
    refreshed = Counter(r.chunk for r in records if r.role == "refresh")
    assert refreshed == Counter(range(case.plan.num_chunks - 1))  # the last chunk is nobody's history
    near = [r for r in records if r.branch == "near"]
    assert near and near[0].decision == "full"
    assert {"full", "reuse", "select"} >= {r.decision for r in near} > {"full"}


def test_residuals_of_finished_chunks_are_freed():
    case = Case(next(n for n in RUNS if "distill" in n and "t2v" in n))
    denoiser = cached(case, CACHED)
    sample(case, denoiser)
    held = [key for key, state in denoiser.engine._states.items() if state.buffer.last is not None]
    assert {chunk for chunk, _ in held} == {case.plan.num_chunks - 1}


def test_a_time_modulation_cannot_be_measured():
    case = Case(RUNS[0])
    with pytest.raises(UserError, match="no time modulation"):
        cached(case, CACHED.replace(distance="modulation"))


@pytest.mark.parametrize("branch", ["uncond", "near"])
def test_reused_tokens_are_attended_to_in_passes_that_leave_no_trace(branch, monkeypatch):
    case = Case(next(n for n in RUNS if ("distill" in n) == (branch == "near")))
    denoiser = cached(case, CACHED)
    update, seen = LayerView.update, []

    def counted(view, key, value):
        rows = update(view, key, value)
        cache = denoiser.caches.get(branch)
        if cache is not None and view.own in cache._layers and view.write.tokens is not None:
            seen.append((key.shape[1], rows[0].shape[1]))
        return rows

    monkeypatch.setattr(LayerView, "update", counted)
    sample(case, denoiser)
    selected = next(r for r in denoiser.trace.records if r.branch == branch and r.decision == "select")
    assert set(seen) == {(selected.tokens, selected.tokens_total)}
    assert selected.tokens < selected.tokens_total
    video = case.plan.num_chunks * selected.tokens_total
    assert denoiser.caches[branch].length(video) == selected.tokens_total, "finished chunks are freed"
