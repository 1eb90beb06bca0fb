"""MotionCache on a `Magi1Pipeline`: attaching, detaching, what is computed, where it is kept."""

import numpy as np
import pytest
import torch
from magi_random import make_magi_pipeline
from test_magi_adapter import CACHED

from common.cache import KVCache, MotionCacheConfig
from common.errors import UserError
from magi1_motioncache import ExactDenoiser, apply_motioncache, attach, cache_preset, remove_motioncache
from magi1_motioncache.adapter import CachedDenoiser
from magi1_motioncache.loading import place_pipeline
from magi1_motioncache.plan import Role

CHUNK = 8  # frames
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


@pytest.mark.parametrize("cfg_number", [1, 3])
@pytest.mark.parametrize("kv_budget", [None, 1], ids=["whole", "compressed"])
def test_where_the_state_is_kept_changes_nothing(cfg_number, kv_budget, staged):
    # A chunk's first forwards attend to all six clean chunks, its later ones to fewer.
    pipe = make_magi_pipeline(layers=3, cfg_number=cfg_number, window_size=2, noise2clean_kvrange=(6, 5))
    pipe.set_progress_bar_config(disable=True)
    latents, attended = {}, {}
    for budget, device in ((None, "model"), (kv_budget, "model"), (kv_budget, "cpu")):
        handle = apply_motioncache(pipe, CACHED.replace(kv_budget=budget, state_device=device))
        latents[device] = generate(pipe, num_frames=7 * CHUNK, width=32)
        attended[budget] = sum(record.kv_tokens for record in handle.trace.records)
        remove_motioncache(pipe)
    assert torch.equal(latents["cpu"], latents["model"])
    assert staged and (attended[kv_budget] < attended[None]) == (kv_budget is not None)


class Watched(CachedDenoiser):
    """Notes what is held at each forward of a finished chunk, and remembers itself."""

    made: list["Watched"] = []  # noqa: RUF012

    def __init__(self, *args):
        super().__init__(*args)
        self.held, self.seen = [], set()
        self.made.append(self)

    def predict(self, call, latents):
        velocity = super().predict(call, latents)
        if call.role is Role.CLEAN and call.branch is self.plan.keeping_pass:
            self.held.append(self.engine.memory()["signals"] + self.engine.memory()["values"])
        self.seen |= {len(self._captions), len(self._positions) - 1}  # of these, also a nearly clean copy's
        return velocity


@pytest.mark.parametrize("kvrange", [(4, 3, 2, 1), (1,)], ids=str)
@pytest.mark.parametrize("cfg_number", [1, 3])
def test_what_is_held_does_not_grow_with_the_video(cfg_number, kvrange, monkeypatch):
    monkeypatch.setattr(attach, "CachedDenoiser", Watched)
    pipe = make_magi_pipeline(cfg_number=cfg_number, window_size=2, noise2clean_kvrange=kvrange)
    pipe.set_progress_bar_config(disable=True)
    apply_motioncache(pipe, CACHED)
    chunks = 10
    generate(pipe, num_frames=chunks * CHUNK, height=32, width=32)
    denoiser = Watched.made.pop()
    assert len(denoiser.held) == chunks - 1 and len(set(denoiser.held[2:-1])) == 1
    values = {chunk for (chunk, _), state in denoiser.engine._states.items() if state.buffer.last is not None}
    assert values == {chunks - 1}
    assert max(denoiser.seen) <= 1 + kvrange[0] + 2  # of no chunk, of the history and of two at work


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


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("cfg_number", [1, 3])
@pytest.mark.parametrize(("window", "ranges"), [(2, (2,)), (2, ()), (4, (5, 4, 3, 2)), (4, (2, 4, 1, 1))], ids=str)
def test_room_for_keys_is_made_for_as_many_chunks_as_are_held(cfg_number, window, ranges, prefix, monkeypatch):
    held, room = {}, {}

    class Counted(KVCache):
        def __init__(self, *given):
            super().__init__(*given)
            room[self] = self.rows

        def open(self, write, like):
            opened = super().open(write, like)
            held[self] = max(held.get(self, 0), write.end - self._layers[0].removed)
            return opened

    monkeypatch.setattr("magi1_motioncache.adapter.KVCache", Counted)
    distilled = {"distill": True, "shortcut_mode": "8,16,16"} if cfg_number == 1 else {}
    sampling = {"num_steps": 12, "window_size": window, "noise2clean_kvrange": ranges, "cfg_number": cfg_number}
    pipe = make_magi_pipeline(layers=1, clean_chunk_kvrange=1, **sampling, **distilled)
    pipe.set_progress_bar_config(disable=True)
    apply_motioncache(pipe, MotionCacheConfig(distance="input", alpha=0.5, threshold=1e9, score="latent_motion"))
    picture = np.zeros((32, 32, 3), np.uint8)
    given = {0: {}, 1: {"image": picture}, 5: {"video": np.stack([picture] * 20)}}[prefix]
    pipe("a red circle", **{**SIZE, "width": 32, "num_frames": 56}, **given)
    assert held == room and len(room) == (3 if cfg_number == 3 else 2)
