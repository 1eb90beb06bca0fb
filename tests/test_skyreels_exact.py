"""The exact mode equals the stock forward over whole asynchronous schedules, and every part of it is needed."""

import pytest
import torch
from skyreels_random import LONG, TEXT_TOKENS, random_pipeline

from common.cache import MotionCacheConfig
from skyreels_v2_motioncache import apply_motioncache, hook, remove_motioncache, routing
from skyreels_v2_motioncache.plan import WindowPlan

EXACT = MotionCacheConfig.preset("exact")
TOLERANCE = 1e-4


def errors(pipe, call, config=EXACT, prefix_noise="fresh", **options) -> float:
    """Largest absolute difference of the final latents between the stock pipeline and the attached one."""
    stock = call(**options)
    apply_motioncache(pipe, config, prefix_noise)
    ours = call(**options)
    remove_motioncache(pipe)
    assert stock.std() > 0.1
    return (stock - ours).abs().max().item()


@pytest.mark.parametrize(
    "shape",
    [
        {"block": 2, "fps": True},
        {"block": 4, "heads": 3, "head_dim": 8, "layers": 2},
        {"block": 1, "fps": True},  # no causal mask: the window is one chunk
    ],
    ids=str,
)
def test_one_window_equals_stock(shape):
    assert errors(*random_pipeline(**shape)) < TOLERANCE


@pytest.mark.parametrize("noise", [0, 20])
def test_three_windows_with_overlap_equal_stock(noise):
    assert errors(*random_pipeline(fps=True), addnoise_condition=noise, **LONG) < TOLERANCE


@pytest.mark.parametrize("kind", ["i2v", "v2v"])
@pytest.mark.parametrize("noise", [0, 20])
def test_given_frames_equal_stock(kind, noise):
    options = {"addnoise_condition": noise, **LONG}
    assert errors(*random_pipeline(kind), **options) < TOLERANCE


@pytest.mark.parametrize("options", [{"num_videos_per_prompt": 2}, {"prompts": 2}, {"guidance_scale": 1.0}], ids=str)
def test_videos_of_a_batch_equal_stock(options):
    pipe, call = random_pipeline()
    if "prompts" in options:
        prompts, negatives = torch.randn(2, 2, TEXT_TOKENS, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
        options = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    first, *others = call(**options)
    assert all((first - other).abs().max() > 0.1 for other in others)
    assert errors(pipe, call, **options) < TOLERANCE
    apply_motioncache(pipe, MotionCacheConfig(distance="input", budget=0.4, warmup_steps=2, chunk_phase=1))
    cached = call(**options)
    assert cached.shape == (1 + len(others), *first.shape) and torch.isfinite(cached).all()


def test_a_prompt_that_is_exchanged_on_the_way_equals_stock():
    other = torch.randn(1, TEXT_TOKENS, 16, generator=torch.Generator().manual_seed(3))

    def exchange(pipe, i, t, tensors):
        return {"prompt_embeds": other} if i == 4 else {}

    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    pipe, call = random_pipeline()
    assert (call(callback_on_step_end=exchange, **names) - call()).abs().max() > 0.1
    assert errors(pipe, call, callback_on_step_end=exchange, **names) < TOLERANCE


def test_synchronous_mode_equals_stock():
    assert errors(*random_pipeline(), ar_step=0) < TOLERANCE


def test_frozen_prefix_noise_is_close_but_cheaper():
    pipe, call = random_pipeline()
    difference = errors(pipe, call, prefix_noise="frozen", addnoise_condition=20, **LONG)
    assert TOLERANCE < difference < 0.5
    computed = {}
    for noise in ("fresh", "frozen"):
        handle = apply_motioncache(pipe, EXACT, noise)
        call(addnoise_condition=20, **LONG)
        remove_motioncache(pipe)
        computed[noise] = handle.trace.totals()["tokens_computed"]
    assert computed["frozen"] < 0.8 * computed["fresh"]


@pytest.mark.parametrize(
    "config",
    [
        {"threshold": 0.0},
        {"budget": 1.0},
        {"threshold": 0.0, "reuse": "velocity", "score": "latent_motion"},
        {"threshold": 0.0, "extrapolation": "logsnr"},
        {"threshold": 0.0, "state_device": "cpu"},
    ],
    ids=str,
)
def test_a_policy_that_always_computes_equals_stock(config, staged):
    always = MotionCacheConfig(distance="input", chunk_phase=1, warmup_steps=1).replace(**config)
    assert errors(*random_pipeline(), config=always, **LONG) < TOLERANCE
    assert bool(staged) == ("state_device" in config)


@pytest.mark.parametrize("kv_budget", [None, 1], ids=["whole", "compressed"])
def test_where_the_state_is_kept_changes_nothing(kv_budget, staged):
    pipe, call = random_pipeline()
    latents, attended = {}, {}
    for budget, device in ((None, "model"), (kv_budget, "model"), (kv_budget, "cpu")):
        config = MotionCacheConfig(
            distance="input", budget=0.4, warmup_steps=1, chunk_phase=0, kv_budget=budget, state_device=device
        )
        handle = apply_motioncache(pipe, config)
        latents[device] = call(**LONG)
        attended[budget] = sum(record.kv_tokens for record in handle.trace.records)
        remove_motioncache(pipe)
    assert torch.equal(latents["cpu"], latents["model"])
    assert staged and (attended[kv_budget] < attended[None]) == (kv_budget is not None)


def test_without_the_refresh_of_clean_chunks_it_fails(monkeypatch):
    def active_only(self, iteration, clean):
        return [c for c in range(self.chunks) if self.status(iteration, c) == "active"]

    monkeypatch.setattr(WindowPlan, "work", active_only)
    assert errors(*random_pipeline()) > 10 * TOLERANCE


def test_with_a_wrong_rotary_offset_it_fails(monkeypatch):
    original = routing._ChunkRotary.forward

    def early(self, hidden_states):
        self._route.first_frame = max(self._route.first_frame - 1, 0)
        return original(self, hidden_states)

    monkeypatch.setattr(routing._ChunkRotary, "forward", early)
    assert errors(*random_pipeline()) > 10 * TOLERANCE


def test_with_a_wrong_modulation_row_it_fails(monkeypatch):
    original = hook.MotionCacheHook._run_chunk

    def late(self, module, name, branch, chunk, latents, timestep, conditions):
        return original(self, module, name, branch, chunk, latents, (timestep - 20).clamp(min=0), conditions)

    monkeypatch.setattr(hook.MotionCacheHook, "_run_chunk", late)
    assert errors(*random_pipeline()) > 10 * TOLERANCE


def test_no_mask_is_built(monkeypatch):
    pipe, call = random_pipeline()
    apply_motioncache(pipe, EXACT)
    original, masks = routing._RoutedBlocks.__iter__, []

    def spy(self):
        (stack,) = original(self)

        def watched(x, text, modulation, rope, mask):
            masks.append(mask)
            return stack(x, text, modulation, rope, mask)

        return iter([watched])

    monkeypatch.setattr(routing._RoutedBlocks, "__iter__", spy)
    call()
    assert masks and all(mask is None for mask in masks)


def test_tokens_enter_the_blocks_side_by_side(monkeypatch):
    pipe, call = random_pipeline()
    apply_motioncache(pipe, EXACT)
    seen = []
    pipe.transformer.blocks[-1].register_forward_pre_hook(lambda block, args: seen.append(args[0].is_contiguous()))
    call()
    assert seen and all(seen)


def test_memory_is_flat_over_windows():
    pipe, call = random_pipeline()
    handle = apply_motioncache(pipe, MotionCacheConfig(distance="input", warmup_steps=2, chunk_phase=1))
    held = []
    start = handle.hook.start_window

    def spy(plan):
        held.append(sum(b.kv.bytes for b in handle.hook.branches._state_cache.values() if b.kv is not None))
        start(plan)
        assert not handle.hook.engine._states

    handle.hook.start_window = spy
    call(**{**LONG, "num_frames": 29 + 16 * 5})
    assert len(held) == 6
    assert held[0] == 0
    assert len(set(held[1:])) == 1
    pipe.maybe_free_model_hooks()
    assert not handle.hook.branches._state_cache
    remove_motioncache(pipe)


def test_bfloat16_stays_near_float32():
    pipe, call = random_pipeline()
    reference = call()
    pipe.transformer.to(torch.bfloat16)
    apply_motioncache(pipe, EXACT)
    assert (call() - reference).abs().max() < 0.3
