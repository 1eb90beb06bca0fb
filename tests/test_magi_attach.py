"""MotionCache on a `Magi1Pipeline`: attaching, detaching, what is computed, where it is kept."""

import pytest
import torch
from magi_random import make_magi_pipeline
from test_magi_adapter import CACHED

from common.cache import MotionCacheConfig
from common.errors import UserError
from magi1_motioncache import ExactDenoiser, apply_motioncache, cache_preset, remove_motioncache
from magi1_motioncache.loading import place_pipeline

SIZE = {"height": 32, "width": 48, "num_frames": 24, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    pipe = make_magi_pipeline(tokens=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **options) -> torch.Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **{**SIZE, **options}).frames


def cached(pipe, config: MotionCacheConfig) -> tuple[torch.Tensor, dict[str, int]]:
    handle = apply_motioncache(pipe, config)
    try:
        return generate(pipe), handle.trace.totals()
    finally:
        remove_motioncache(pipe)


def test_exact_equals_the_pipeline_alone(pipe):
    latents, totals = cached(pipe, MotionCacheConfig.preset("exact"))
    torch.testing.assert_close(latents, generate(pipe))
    assert totals["tokens_computed"] == totals["tokens_total"] > 0


def test_the_pipeline_is_as_before_when_the_cache_is_removed(pipe):
    before = generate(pipe)
    latents, totals = cached(pipe, CACHED)
    assert totals["tokens_computed"] < totals["tokens_total"]
    assert not torch.equal(latents, before) and torch.equal(generate(pipe), before)
    assert pipe.denoiser is ExactDenoiser


def test_each_video_has_its_own_trace(pipe):
    handle = apply_motioncache(pipe, cache_preset("slow"), keep_maps=True)
    try:
        generate(pipe)
        first = handle.trace
        generate(pipe, num_frames=8)
        assert len(handle.trace.records) < len(first.records) and handle.trace.maps
    finally:
        remove_motioncache(pipe)


def test_a_denoiser_of_the_call_wins(pipe):
    before = generate(pipe)
    apply_motioncache(pipe, CACHED)
    try:
        assert torch.equal(generate(pipe, denoiser=ExactDenoiser), before)
    finally:
        remove_motioncache(pipe)


@pytest.mark.parametrize(
    "changes",
    [{"state_device": "cpu"}, {"kv_budget": 1, "state_device": "cpu"}],
    ids=["whole", "compressed"],
)
def test_where_the_state_is_kept_changes_nothing(pipe, changes):
    kept = {name: value for name, value in changes.items() if name != "state_device"}
    latents, _ = cached(pipe, CACHED.replace(**changes))
    assert torch.equal(latents, cached(pipe, CACHED.replace(**kept))[0])


def test_misuse_is_named(pipe):
    with pytest.raises(UserError, match="no cache to remove"):
        remove_motioncache(pipe)
    with pytest.raises(UserError, match="not a MAGI-1 pipeline"):
        apply_motioncache(pipe.transformer, CACHED)
    with pytest.raises(UserError, match="no time modulation"):
        apply_motioncache(pipe, MotionCacheConfig())
    apply_motioncache(pipe, CACHED)
    try:
        with pytest.raises(UserError, match="has a cache already"):
            apply_motioncache(pipe, CACHED)
    finally:
        remove_motioncache(pipe)


def test_layers_that_wait_elsewhere_compute_the_same():
    pipe = make_magi_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe)
    place_pipeline(pipe, torch.device("cpu"), "group")
    layers = pipe.transformer.videodit_blocks.layers
    assert all(layer._diffusers_hook.get_hook("group_offloading") is not None for layer in layers)
    assert torch.equal(generate(pipe), before)
