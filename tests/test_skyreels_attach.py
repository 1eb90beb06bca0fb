"""Attaching and detaching: without a trace, beside offloading, with clear errors."""

import logging

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from diffusers.models.attention_dispatch import attention_backend
from skyreels_random import random_pipeline

from common.cache import MotionCacheConfig
from common.errors import UserError
from common.patches import from_tokens, to_tokens
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.polynomial import with_polynomial

CACHED = MotionCacheConfig(distance="input", budget=0.4, warmup_steps=2, chunk_phase=1)


def attributes(pipe) -> dict[str, object]:
    transformer = pipe.transformer
    processors = {f"processor {name}": p for name, p in transformer.attn_processors.items()}
    return {
        **{f"pipe.{k}": v for k, v in vars(pipe).items()},
        **{f"transformer.{k}": v for k, v in vars(transformer).items() if k not in ("_modules", "_internal_dict")},
        **{f"module {k}": v for k, v in transformer.named_modules()},
        **processors,
        "config": dict(transformer.config),
    }


def test_detaching_leaves_no_trace():
    pipe, call = random_pipeline()
    before, reference = attributes(pipe), call()
    before = attributes(pipe)  # the pipeline itself notes some things in its first call
    before.pop("transformer._diffusers_hook", None)
    apply_motioncache(pipe, CACHED)
    cached = call()
    remove_motioncache(pipe)
    after = attributes(pipe)
    assert after.keys() == before.keys()
    changed = [k for k in after if k != "pipe._num_timesteps" and after[k] is not before[k] and after[k] != before[k]]
    assert not changed
    assert not torch.equal(cached, reference)
    assert torch.equal(call(), reference)


def test_state_dict_is_the_same_while_attached():
    pipe, _ = random_pipeline()
    names = list(pipe.transformer.state_dict())
    apply_motioncache(pipe, CACHED)
    assert list(pipe.transformer.state_dict()) == names


def test_calls_do_not_remember_each_other():
    pipe, call = random_pipeline()
    handle = apply_motioncache(pipe, CACHED)
    first = call()
    records = len(handle.trace.records)
    call(num_frames=13)
    assert torch.equal(call(), first)
    assert len(handle.trace.records) == records


def test_the_attention_backend_chosen_meanwhile_survives():
    pipe, call = random_pipeline()
    apply_motioncache(pipe, CACHED)
    with attention_backend("native"):  # puts the library's global choice back, which the next line changes too
        pipe.transformer.set_attention_backend("_native_math")
        call()
    remove_motioncache(pipe)
    backends = {p._attention_backend for p in pipe.transformer.attn_processors.values()}
    assert [b.value for b in backends] == ["_native_math"]


def test_fused_projections_give_the_same():
    pipe, call = random_pipeline()
    apply_motioncache(pipe, CACHED)
    plain = call()
    for block in pipe.transformer.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    assert (call() - plain).abs().max() < 1e-4


def test_group_offload_before_and_after_gives_the_same():
    pipe, call = random_pipeline()
    apply_motioncache(pipe, CACHED)
    reference = call()
    remove_motioncache(pipe)
    options = {
        "onload_device": torch.device("cpu"),
        "offload_device": torch.device("cpu"),
        "offload_type": "leaf_level",
    }
    pipe.transformer.enable_group_offload(**options)
    apply_motioncache(pipe, CACHED)
    assert torch.equal(call(), reference)

    pipe, call = random_pipeline()
    apply_motioncache(pipe, CACHED)
    pipe.transformer.enable_group_offload(**{**options, "offload_type": "block_level", "num_blocks_per_group": 1})
    assert torch.equal(call(), reference)


def test_accelerate_hooks_before_and_after_survive():
    from accelerate.hooks import CpuOffload, add_hook_to_module

    pipe, call = random_pipeline()
    reference = call()
    add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
    apply_motioncache(pipe, MotionCacheConfig.preset("exact"))
    assert (call() - reference).abs().max() < 1e-4
    remove_motioncache(pipe)
    assert torch.equal(call(), reference)

    pipe, call = random_pipeline()
    apply_motioncache(pipe, MotionCacheConfig.preset("exact"))
    add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
    remove_motioncache(pipe)
    assert hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(call(), reference)


def test_one_chunk_is_said(caplog):
    pipe, call = random_pipeline(block=1)
    apply_motioncache(pipe, CACHED)
    with caplog.at_level(logging.WARNING):
        call(ar_step=0)
    assert "cached as one chunk" in caplog.text


def test_patches_round_trip():
    x = torch.randn(2, 3, 4, 6, 8)
    tokens = to_tokens(x, (1, 2, 2))
    assert tokens.shape == (2, 4 * 3 * 4, 12)
    assert torch.equal(from_tokens(tokens, (4, 3, 4), (1, 2, 2)), x)


def test_errors():
    pipe, call = random_pipeline()
    with pytest.raises(UserError, match="not a SkyReels-V2"):
        apply_motioncache(UniPCMultistepScheduler(), CACHED)
    with pytest.raises(UserError, match="no cache to remove"):
        remove_motioncache(pipe)
    with pytest.raises(UserError, match="prefix_noise"):
        apply_motioncache(pipe, CACHED, prefix_noise="sometimes")
    apply_motioncache(pipe, CACHED)
    with pytest.raises(UserError, match="a cache already"):
        apply_motioncache(pipe, CACHED)
    with pytest.raises(UserError, match="does not fill chunks of 2"):
        call(num_frames=25)
    with pytest.raises(RuntimeError, match="outside the pipeline"):
        pipe.maybe_free_model_hooks()
        with pipe.transformer.cache_context("cond"):
            pipe.transformer(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 2), torch.zeros(1, 8, 16))


def test_the_polynomial_of_a_published_architecture_is_filled_in():
    with torch.device("meta"):
        sizes = {"attention_head_dim": 128, "ffn_dim": 8, "text_dim": 8, "freq_dim": 8, "num_frame_per_block": 5}
        models = [
            SkyReelsV2Transformer3DModel(num_attention_heads=heads, num_layers=layers, **sizes)
            for heads, layers in ((12, 30), (40, 40), (12, 29))
        ]
    small, large, other = (with_polynomial(MotionCacheConfig.preset("slow"), model).polynomial for model in models)
    assert (small[0], large[0], other) == (-5.21862437e4, -3.03318725e5, None)
    own = MotionCacheConfig(polynomial=(1.0, 0.0))
    assert with_polynomial(own, models[0]) == own
    assert with_polynomial(CACHED, models[0]) == CACHED


def test_settings_that_this_model_cannot_follow_are_refused():
    pipe, _ = random_pipeline()
    with pytest.raises(UserError, match=r"needs a polynomial.*'input' or 'table'"):
        apply_motioncache(pipe, MotionCacheConfig.preset("slow"))
    with pytest.raises(UserError, match="reuse: 'update' is not allowed"):
        apply_motioncache(pipe, CACHED.replace(reuse="update", alpha=1.0))
