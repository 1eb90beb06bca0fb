"""The training code: its forward is the stock model's, its noise is the sampler's, its loop resumes."""

import json

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from torch import nn
from transformers import UMT5EncoderModel

from training import forcing, muon, procedural, skyreels, text, trainer, wan_codec
from training.codec import ReconstructionTask
from training.export import export_skyreels
from training.generator import Phase
from training.latents import LatentPool, encode_shard
from training.wan_codec import WanCodec

CHANNELS = 16


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = skyreels.build_transformer(CHANNELS).eval()
    # Layers that start at zero would hide everything behind them.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def test_training_forward_equals_the_stock_forward(transformer):
    latents, caption = torch.randn(2, CHANNELS, 6, 8, 12), torch.randn(2, 7, text.TEXT_DIM)
    timestep = torch.tensor([[0.0, 0, 0, 500, 500, 500], [20, 20, 20, 999, 999, 999]])
    with torch.no_grad():
        stock = transformer(latents, timestep, caption, enable_diffusion_forcing=True, return_dict=False)[0]
        ours = skyreels.forward_frames(transformer, latents, timestep, caption)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_a_chunk_does_not_see_later_ones(transformer):
    latents, caption = torch.randn(1, CHANNELS, 6, 8, 8), torch.randn(1, 7, text.TEXT_DIM)
    timestep = torch.full((1, 6), 300.0)
    changed = latents.clone()
    changed[:, :, 3:] += 1
    with torch.no_grad():
        first = skyreels.forward_frames(transformer, latents, timestep, caption)
        second = skyreels.forward_frames(transformer, changed, timestep, caption)
    torch.testing.assert_close(first[:, :, :3], second[:, :, :3])
    assert (first[:, :, 3:] - second[:, :, 3:]).abs().max() > 1e-3


def test_places_are_ordered_as_the_sampler_orders_them():
    places, active = forcing.draw_places(4000, 4, torch.Generator().manual_seed(0))
    assert places.min() >= 0 and places.max() <= 1
    assert active[:, -1].all()
    assert (active == (places > 0)).all()
    ordered = (places.diff(dim=1) >= 0).all(dim=1).float().mean()
    # All lagged and equal samples are ordered, and few independent ones.
    assert 0.65 < ordered < 0.75
    assert 0.1 < (~active).float().mean() < 0.35


def test_shifted_schedule_ends_where_it_should():
    u = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(forcing.shifted(u, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(forcing.shifted(u, 1.0), u)


def test_tokenizer_knows_the_grammar_and_ends_the_empty_prompt():
    tokenizer = text.build_tokenizer()
    for caption in procedural.prompts("choosing", 64):
        ids = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer("a red elephant").input_ids[2] == tokenizer.unk_token_id


def test_muon_orthogonalises_and_minimises():
    singular = torch.linalg.svdvals(muon.orthogonalise(torch.randn(3, 24, 40), steps=8))
    assert singular.min() > 0.6 and singular.max() < 1.3
    torch.manual_seed(0)
    target, weight = torch.randn(16, 16), nn.Parameter(torch.zeros(16, 16))
    optimizer = muon.BatchedMuon([weight], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.1
    with pytest.raises(ValueError, match="vectors"):
        muon.BatchedMuon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_learning_rate_rises_stays_and_falls():
    shares = [trainer.learning_rate_share(p, 0.1, 0.4) for p in (0.05, 0.1, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


class Line:
    """A task small enough to train in a test."""

    def __init__(self):
        self.model = nn.Linear(2, 1)

    def is_hidden_matrix(self, name):
        return False

    def loss(self, step, progress, rank, world):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
        return (self.model(x).squeeze(-1) - x[:, 0] + 2 * x[:, 1]).square().mean()


def test_training_learns_logs_and_resumes(tmp_path):
    config = trainer.TrainConfig(minutes=0.03, learning_rate=0.1, ema_decay=0.9, log_steps=5)
    seen = []
    ema = trainer.train(Line(), config, tmp_path, "line", on_checkpoint=lambda model, record: seen.append(record))
    torch.testing.assert_close(ema.weight.detach(), torch.tensor([[1.0, -2.0]]), atol=0.1, rtol=0)
    records = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert records[0]["parameters"] == 3
    assert records[-1]["loss"] < 0.05 < records[1]["loss"]
    # The budget is spent, so a second call returns the same weights at once.
    again = trainer.train(Line(), config, tmp_path, "line")
    torch.testing.assert_close(again.weight, ema.weight)
    assert seen[-1]["step"] == records[-1]["step"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pool")
    encode_shard(WanCodec(wan_codec.build_vae()), folder, 0, clips=2, frames=21, size=32)
    return folder


def test_pool_gives_windows_of_the_encoded_clips(pool):
    latents = LatentPool(pool)
    assert latents.refresh() == 2
    windows, captions, later = latents.sample(16, 3, 0.5, torch.Generator().manual_seed(0))
    assert windows.shape == (16, wan_codec.Z_DIM, 3, 8, 8) and windows.dtype == torch.float32
    assert 0 < later.sum() < 16
    stored = torch.load(pool / "0000.pt", weights_only=True)
    for window, caption, is_later in zip(windows, captions, later, strict=True):
        clip = stored["latents"][stored["captions"].index(caption)].float()
        matches = [torch.equal(window, clip[:, start : start + 3]) for start in range(4)]
        assert any(matches) and matches[0] == (not is_later)


def test_aligned_windows_begin_where_a_chunk_does(pool):
    clip = torch.load(pool / "0000.pt", weights_only=True)["latents"][:, 0, :, 0, 0]
    windows, _, later = LatentPool(pool).sample(32, 2, 0.5, torch.Generator().manual_seed(0), stride=2)
    starts = {
        start
        for window in windows[later]
        for start in range(5)
        if any(torch.equal(window[0, :, 0, 0], latents[start : start + 2].float()) for latents in clip)
    }
    assert starts == {2, 4}


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_loss_has_gradients_everywhere(pool, monkeypatch, progress):
    phases = (Phase("pictures", 32, 0.5), Phase(".", 32, 1.0, (1,)))
    task = skyreels.SkyReelsTask(wan_codec.Z_DIM, pool, tokens=96, phases=phases)
    task.pools["pictures"] = LatentPool(pool)
    monkeypatch.setattr(skyreels, "CAPTION_DROPOUT", 0.0)
    nn.init.normal_(task.model["transformer"].proj_out.weight, std=0.02)
    task.loss(0, progress, 0, 1).backward()
    silent = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_pictures_are_first_frames_and_more_of_them(pool):
    task = skyreels.SkyReelsTask(
        wan_codec.Z_DIM, pool, tokens=96, phases=(Phase(".", 32, 0.5), Phase(".", 32, 1, (1,)))
    )
    pictures, chunks = task.draw_windows(0, 0.4, 0), task.draw_windows(0, 0.6, 0)
    assert pictures.clean.shape[0] == 3 * chunks.clean.shape[0] and not pictures.later.any()
    assert task.chunks_of(pictures.clean) == (1, 1) and task.chunks_of(chunks.clean) == (1, skyreels.BLOCK)
    first = torch.load(pool / "0000.pt", weights_only=True)["latents"][:, :, :1].float()
    assert all(any(torch.equal(picture, frame) for frame in first) for picture in pictures.clean)


def test_reconstruction_reaches_the_ends():
    torch.manual_seed(0)
    task = ReconstructionTask(WanCodec.build())
    loss = task.loss(1, 0.0, 0, 1)
    loss.backward()
    assert loss.isfinite()
    assert task.model.decoder.conv_out.weight.grad.abs().max() > 0


def test_measured_latents_are_normalised():
    torch.manual_seed(0)
    codec = WanCodec(wan_codec.build_vae())
    codec.measure(clips=2, frames=5, size=32)
    latents = codec.encode(wan_codec.pixels("vae", [0, 1], 5, 32)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(codec.channels), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(codec.channels), atol=1e-2, rtol=0)


def test_export_is_a_pipeline_the_library_loads(tmp_path, transformer):
    tokenizer = text.build_tokenizer()
    model = nn.ModuleDict(
        {"transformer": transformer, "text_encoder": text.build_text_encoder(UMT5EncoderModel, len(tokenizer))}
    )
    export_skyreels(tmp_path, model, tokenizer, wan_codec.build_vae())
    pipeline = SkyReelsV2DiffusionForcingPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae_scale_factor_spatial == pipeline.vae_scale_factor_temporal == 4
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32
    captions = procedural.prompts("choosing", 2)
    with torch.no_grad():
        stock = pipeline.encode_prompt(captions, max_sequence_length=32, do_classifier_free_guidance=False)[0]
        ours = text.embed(captions, tokenizer, model["text_encoder"], 32)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    video = pipeline(
        captions[0],
        height=32,
        width=32,
        num_frames=21,
        base_num_frames=21,
        num_inference_steps=2,
        ar_step=1,
        causal_block_size=3,
        max_sequence_length=32,
        output_type="np",
    ).frames
    assert video.shape == (1, 21, 32, 32, 3)
