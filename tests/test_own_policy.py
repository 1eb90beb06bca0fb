"""A policy of one's own, on both models: the one in the documents, and what may stand beside it."""

import re

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import LONG, random_pipeline

import magi1_motioncache
import skyreels_v2_motioncache
from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from common.cache.calibration import ChangeRecorder
from common.cache.policy import MotionCachePolicy
from common.cache.teacache import TeaCachePolicy
from common.errors import UserError
from common.runs import REPOSITORY

GIVEN = torch.rand(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def skyreels():
    pipe, call = random_pipeline()
    return pipe, lambda: call(**LONG), skyreels_v2_motioncache.apply_motioncache


def magi(**sampling):
    pipe = make_magi_pipeline(**{"window_size": 2, "noise2clean_kvrange": (2,), **sampling})
    pipe.set_progress_bar_config(disable=True)

    def call(**options):
        generator = torch.Generator().manual_seed(0)
        sizes = {"height": 32, "width": 32, "num_frames": 40, "output_type": "latent"}
        return pipe("a red circle", generator=generator, **{**sizes, **options}).frames

    return pipe, call, magi1_motioncache.apply_motioncache


def documented() -> str:
    """The code that a document shows."""
    text = (REPOSITORY / "docs/new_model.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.mark.parametrize("model", [skyreels, magi])
def test_the_policy_in_the_documents_runs_as_it_is_written(model):
    pipe, call, apply = model()
    names = {"pipe": pipe, "apply_motioncache": apply}
    exec(documented(), names)
    first, trace = call(), names["handle"].trace
    selected = [r for r in trace.records if r.decision == "select"]
    assert {r.tokens for r in selected} == {r.tokens_total * 3 // 10 for r in selected} and selected
    assert {r.decision for r in trace.records if r.step < 5} == {"full"}
    assert {r.decision for r in trace.records if r.role == "denoise"} == {"full", "select"}
    assert torch.isfinite(first).all() and torch.equal(call(), first)


@pytest.mark.parametrize("model", [skyreels, magi])
def test_a_policy_decides_whatever_the_config_would_have_decided_by(model):
    def run(config):
        pipe, call, apply = model()
        names = {"pipe": pipe, "apply_motioncache": apply}
        exec(documented().replace('MotionCacheConfig(extrapolation="logsnr")', "config"), {**names, "config": config})
        return call()

    tokenwise = MotionCacheConfig(threshold=0.0)
    assert torch.equal(run(tokenwise), run(tokenwise.replace(method="teacache", alpha=1.0, threshold=9.0)))


def test_a_policy_begins_each_video_anew():
    config = MotionCacheConfig(distance="input", alpha=1.0, threshold=0.5, warmup_steps=1, grading=0.9)
    pipe, call, apply = magi(cfg_number=1)
    handle = apply(pipe, config, policy=MotionCachePolicy(config))
    call()  # its first chunk is chunk 0, that of a continued video is not
    second = call(video=GIVEN), handle.trace.totals()
    handle.policy = None
    assert torch.equal(call(video=GIVEN), second[0]) and handle.trace.totals() == second[1]


@pytest.mark.parametrize("model", [skyreels, magi])
def test_nothing_is_kept_for_a_policy_beside_exact(model):
    pipe, _, apply = model()
    with pytest.raises(UserError, match="'exact' keeps nothing that a policy of your own") as caught:
        apply(pipe, MotionCacheConfig.preset("exact"), policy=ChangeRecorder())
    assert "\n" not in str(caught.value)


def test_only_policies_that_measure_the_modulation_need_its_polynomial():
    unknown = MotionCacheConfig()
    for policy in (MotionCachePolicy, TeaCachePolicy):
        with pytest.raises(UserError, match="needs a polynomial"):
            policy(unknown)
        policy(unknown.replace(polynomial=(1.0, 0.0)))
    pipe, call, apply = magi(num_steps=4, cfg_number=1)
    recorder = ChangeRecorder()
    apply(pipe, unknown, policy=recorder)
    call(num_frames=16)
    assert recorder.samples and recorder.samples[0].modulation is None


@pytest.mark.parametrize("method", ["motioncache", "teacache"])
def test_a_policy_can_have_latents_whatever_the_config_would_select(method):
    config = MotionCacheConfig(method=method, alpha=1.0, score="latent_motion")
    assert Engine(config, policy=ChangeRecorder()).needs_latents
    assert not Engine(config.replace(distance="input")).needs_latents


@pytest.mark.parametrize("score", ["input_change", "residual_change"])
def test_what_only_selecting_reads_is_not_kept_for_whole_chunks(score):
    config = MotionCacheConfig(distance="input", alpha=1.0, score=score, warmup_steps=1)
    kept = []
    for policy in (None, ChangeRecorder()):
        engine = Engine(config, policy=policy)
        x = torch.ones(1, 4, 2)
        engine.run_blocks(ChunkStep(0, 0, 0, "cond", 0, 4, 0.5, (1, 2, 2), 4), Signals(x), lambda v, _: v)
        engine.finish(x)
        state = engine.state(0, "cond")
        kept.append(state.last_input is not None or state.buffer.change is not None)
    assert kept == [False, True]
