"""Autoencoder, tiles, captions and text of MAGI-1 beyond the reference numbers."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from magi1_motioncache.caption_cleaning import clean_caption
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.plan import Pass, SamplingPlan
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.vae import AutoencoderViTMagi1
from magi1_motioncache.vae_tiling import Axis, Tiling, run_tiled
from tests.magi_cases import parameters, relative_error

TILES = Tiling(length=12, height=16, width=16)


@pytest.fixture(scope="module")
def vae() -> AutoencoderViTMagi1:
    torch.manual_seed(0)
    return AutoencoderViTMagi1(parameters("weights_vae")["ddconfig"]).eval().requires_grad_(False)


def test_a_single_latent_frame_is_four_frames(vae):
    latents = torch.randn(1, 4, 4, 8, 8)
    assert vae.decode(latents[:, :, :1]).shape[2] == 4
    assert vae.tiled_decode(latents, TILES).shape[2] == 16


def test_one_tile_is_the_whole(vae):
    latents = torch.randn(1, 4, 3, 6, 6)
    assert torch.equal(vae.tiled_decode(latents, TILES), vae.decode(latents))


def test_tiles_of_an_identity_change_nothing():
    video = torch.randn(1, 2, 7, 13, 21)
    axes = [Axis(4, 0.5), Axis(8, 0.25), Axis(8, 0.25)]
    for chained in (False, True):
        assert relative_error(run_tiled(video, lambda tile: tile, axes, axes, chained), video) < 1e-6


def test_autoencoder_errors(vae):
    sizes = parameters("weights_vae")["ddconfig"]
    with pytest.raises(UserError, match="use_rope=True is not supported"):
        AutoencoderViTMagi1(sizes | {"use_rope": True})
    with pytest.raises(UserError, match="vit_ncthw is not supported"):
        AutoencoderViTMagi1(sizes, "vit_ncthw")
    with pytest.raises(UserError, match="lacks depth"):
        AutoencoderViTMagi1({key: value for key, value in sizes.items() if key != "depth"})
    with pytest.raises(UserError, match="do not divide into patches"):
        vae.encode(torch.zeros(1, 3, 6, 16, 16))
    with pytest.raises(UserError, match="smaller than one latent"):
        vae.tiled_decode(torch.zeros(1, 4, 1, 8, 8), Tiling(length=3))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("你好世界", ""),
        ("see www.example.org/a_b?c now", "see ?c now"),
        ("A   DOG\n\truns", "a dog runs"),
        ("a <i>slow</i> pan &amp; zoom", "a slow pan zoom"),
        ("well-known dog", "well-known dog"),
        ("a-b-c-d-e", "a b c d e"),
        ("clip.mp4 of jc6640 at 800x600", "of at"),
    ],
)
def test_caption_cleaning(raw, cleaned):
    assert clean_caption(raw) == cleaned


def test_no_text_means_the_null_caption_everywhere():
    null = torch.randn(60, 8)
    captions = ChunkCaptions.build(torch.randn(60, 8), torch.zeros(60), null, num_chunks=3)
    plan = SamplingPlan(VARIANTS["4.5B_distill"].sampling, num_chunks=3)
    for calls in plan.iterations():
        for call in calls:
            assert torch.equal(captions.tokens(call)[0], null[:50])


def test_each_pass_reads_its_caption():
    features, null = torch.randn(60, 8), torch.randn(60, 8)
    captions = ChunkCaptions.build(features, torch.arange(60) < 9, null, num_chunks=6)
    plan = SamplingPlan(VARIANTS["4.5B_base"].sampling, num_chunks=6)
    for calls in plan.iterations():
        for call in calls:
            with_text = call.branch is Pass.TEXT and call.step < plan.config.num_steps
            assert torch.equal(captions.tokens(call)[0], features[:9] if with_text else null[:50])
