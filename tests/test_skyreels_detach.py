"""Detaching gives back what was there, and takes nothing that the cache did not bring."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from skyreels_random import PIPELINES, random_pipeline
from test_skyreels_attach import CACHED

from common.cache import MotionCacheConfig
from common.errors import UserError
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.solver import HostCoefficients


def test_the_cache_is_taken_off_through_any_pipeline_that_shares_the_transformer():
    pipe, call = random_pipeline()
    sibling, reference = PIPELINES["i2v"](**pipe.components), call()
    apply_motioncache(pipe, CACHED)
    cached = call()
    with pytest.raises(UserError, match="or one that shares its transformer; call remove_motioncache"):
        apply_motioncache(sibling, CACHED)
    assert torch.equal(call(), cached)
    remove_motioncache(sibling)
    assert torch.equal(call(), reference)
    assert not {"check_inputs", "generate_timestep_matrix"} & (vars(pipe).keys() | vars(sibling).keys())
    apply_motioncache(sibling, CACHED)
    remove_motioncache(sibling)


def test_a_sibling_that_took_over_our_scheduler_gets_the_stock_one():
    pipe, call = random_pipeline()
    apply_motioncache(pipe, CACHED)
    sibling = PIPELINES["v2v"](**pipe.components)
    del pipe, call
    remove_motioncache(sibling)
    assert not hasattr(sibling.transformer, "_diffusers_hook")
    assert type(sibling.scheduler) is UniPCMultistepScheduler and not isinstance(sibling.scheduler, HostCoefficients)
    apply_motioncache(sibling, CACHED)


def test_attention_processors_that_were_exchanged_meanwhile_stay():
    pipe, call = random_pipeline()
    reference = call()
    apply_motioncache(pipe, CACHED)
    theirs = SkyReelsV2AttnProcessor()
    pipe.transformer.set_attn_processor(theirs)
    with pytest.raises(UserError, match="attention processors were exchanged while the cache was attached"):
        call()
    remove_motioncache(pipe)
    assert set(pipe.transformer.attn_processors.values()) == {theirs}
    assert torch.equal(call(), reference)
    apply_motioncache(pipe, CACHED)
    assert torch.isfinite(call()).all()


def test_methods_and_scheduler_are_given_back_unless_they_were_exchanged_meanwhile():
    pipe, call = random_pipeline()
    heard, check = [], pipe.check_inputs

    def own(*args, **kwargs):
        heard.append(args)
        check(*args, **kwargs)

    pipe.check_inputs = own
    apply_motioncache(pipe, CACHED)
    call()
    remove_motioncache(pipe)
    assert heard and pipe.check_inputs is own and "generate_timestep_matrix" not in vars(pipe)

    apply_motioncache(pipe, CACHED)
    pipe.check_inputs, scheduler = check, UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    remove_motioncache(pipe)
    assert pipe.check_inputs is check and pipe.scheduler is scheduler


def test_a_pipeline_is_saved_as_without_the_cache(tmp_path):
    pipe, _ = random_pipeline()
    pipe.save_pretrained(tmp_path / "stock")
    apply_motioncache(pipe, CACHED)
    pipe.save_pretrained(tmp_path / "attached")
    stock, attached = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        for name in ("stock", "attached")
    )
    assert stock == attached and len(stock) > 4
    again = type(pipe).from_pretrained(tmp_path / "attached", tokenizer=None, text_encoder=None)
    assert type(again.scheduler) is UniPCMultistepScheduler


def test_a_config_that_is_refused_leaves_nothing_behind():
    pipe, _ = random_pipeline()
    scheduler = pipe.scheduler
    with pytest.raises(UserError, match="needs a polynomial"):
        apply_motioncache(pipe, MotionCacheConfig.preset("slow"))
    assert not hasattr(pipe.transformer, "_diffusers_hook") and pipe.scheduler is scheduler
