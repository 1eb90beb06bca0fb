"""The training of the small MAGI-1 model: its forward, noise, passes and autoencoder are those of the sampler."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from common.errors import UserError
from magi1_motioncache import ChunkCaptions, ExactDenoiser, Magi1Pipeline, Pass, Role, SamplingPlan
from magi1_motioncache.captions import NULL_TOKENS
from magi1_motioncache.schedule import timesteps
from magi1_motioncache.text import encode_prompt
from training import magi, procedural, text, vit_codec
from training.codec import ReconstructionTask, pixels
from training.export import export_magi
from training.family import FAMILIES, Run, export_generator, train_generator
from training.generator import PHASES, Phase
from training.latents import LatentPool, encode_shard
from training.magi import SAMPLING, ChunkBatch, forward_chunks
from training.trainer import TrainConfig
from training.vit_codec import ViTCodec

CHANNELS = vit_codec.Z_DIM
CHUNKS, SIDE, TEXT_TOKENS = 5, 8, 7
FRAMES = SAMPLING.chunk_width


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = magi.build_transformer(CHANNELS).eval()
    # Layers that start at zero would hide everything behind them, and equal gates that there are two.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return ViTCodec.build()


@pytest.fixture(scope="module")
def pool(tmp_path_factory, codec):
    folder = tmp_path_factory.mktemp("pool")
    encode_shard(codec, folder, 0, clips=2, frames=48, size=32)
    return folder


def calls_of(iteration: int, branch: Pass) -> list:
    plan = SamplingPlan(SAMPLING, CHUNKS)
    return [call for call in list(plan.iterations())[iteration] if call.branch is branch]


def caption() -> torch.Tensor:
    return torch.randn(TEXT_TOKENS, text.TEXT_DIM, generator=torch.Generator().manual_seed(1))


def batch_of(calls: list, latents: torch.Tensor) -> ChunkBatch:
    """One sample whose chunks are those that the calls run."""
    first = calls[0].chunk
    return ChunkBatch(
        latents=latents,
        time=torch.tensor([[call.t for call in calls]]),
        captions=torch.cat([caption(), torch.full((3, text.TEXT_DIM), 9.0)])[None],  # three tokens of padding
        caption_mask=(torch.arange(TEXT_TOKENS + 3) < TEXT_TOKENS)[None],
        uses_text=torch.tensor([[call.uses_text for call in calls]]),
        text_gate=torch.tensor([[call.branch is Pass.TEXT for call in calls]]),
        starts=torch.tensor([[call.kv_start - first for call in calls]]),
    )


@torch.no_grad()
@pytest.mark.parametrize("branch", [Pass.TEXT, Pass.NULL])
def test_training_forward_equals_the_samplers(transformer, branch):
    # The first step after the oldest chunk was finished: its clean pass and four noisy chunks.
    calls = calls_of(4 * SAMPLING.steps_per_stage, branch)
    assert [call.role for call in calls] == [Role.CLEAN] + 4 * [Role.DENOISE]
    plan = SamplingPlan(SAMPLING, CHUNKS)
    null = transformer.y_embedder.null_caption_embedding
    mask = torch.ones(TEXT_TOKENS)
    captions = ChunkCaptions.build(caption(), mask, null, CHUNKS)
    latents = torch.randn(1, CHANNELS, CHUNKS * FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    denoiser = ExactDenoiser(transformer, captions, plan)
    parts = latents.split(FRAMES, dim=2)
    expected = torch.cat([denoiser.predict(call, parts[call.chunk]) for call in calls], dim=2)
    batch = batch_of(calls, latents)
    torch.testing.assert_close(forward_chunks(transformer, batch), expected, atol=1e-5, rtol=1e-5)
    if branch is Pass.NULL:
        assert not batch.uses_text.any()
        # The keys that this pass has kept are what the text pass finds in the next step.
        (_, *texts), later = (
            calls_of(4 * SAMPLING.steps_per_stage, Pass.TEXT),
            calls_of(4 * SAMPLING.steps_per_stage + 1, Pass.TEXT),
        )
        assert [call.chunk for call in later] == [call.chunk for call in texts]
        expected = torch.cat([denoiser.predict(call, parts[call.chunk]) for call in later], dim=2)
        mixed = batch_of([calls[0], *later], latents)
        actual = forward_chunks(transformer, mixed)[:, :, FRAMES:]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(transformer):
    calls = [calls_of(4 * SAMPLING.steps_per_stage + index, Pass.TEXT)[-3:] for index in (1, 2)]
    latents = torch.randn(2, CHANNELS, 3 * FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    alone = [batch_of(c, x[None]) for c, x in zip(calls, latents, strict=True)]
    # Ranges that differ, so that the attention has to be run in groups.
    alone[1] = dataclasses.replace(alone[1], starts=torch.tensor([[0, 1, 1]]))
    alone[0] = dataclasses.replace(alone[0], starts=torch.tensor([[0, 0, 1]]))
    together = ChunkBatch(
        **{
            field.name: torch.cat([getattr(batch, field.name) for batch in alone])
            for field in dataclasses.fields(ChunkBatch)
        }
    )
    expected = torch.cat([forward_chunks(transformer, batch) for batch in alone])
    torch.testing.assert_close(forward_chunks(transformer, together), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_small_clip_has_the_positions_of_a_part_of_a_large_one(transformer):
    calls = calls_of(0, Pass.TEXT)
    latents = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE)
    batch = batch_of(calls, latents)
    own = forward_chunks(transformer, batch)
    torch.testing.assert_close(forward_chunks(transformer, batch, rope_grid=(SIDE // 2, SIDE // 2)), own)
    assert (forward_chunks(transformer, batch, rope_grid=(SIDE, SIDE)) - own).abs().max() > 1e-4


def test_ranges_are_those_of_the_plan():
    plan = SamplingPlan(SAMPLING, CHUNKS)
    for calls in plan.iterations():
        calls = [call for call in calls if call.branch is Pass.TEXT]
        progress, active = torch.zeros(1, CHUNKS), torch.zeros(1, CHUNKS, dtype=torch.bool)
        for call in calls:
            active[0, call.chunk] = call.role is Role.DENOISE
            progress[0, call.chunk] = min(call.step / SAMPLING.num_steps, 0.999)
        starts = magi.range_starts(progress, active, SAMPLING)
        assert [starts[0, call.chunk].item() for call in calls] == [call.kv_start for call in calls]


@pytest.fixture(scope="module")
def task(pool):
    torch.manual_seed(0)
    phases = (Phase("pictures", 32, 0.5), Phase("clips", 32, 1.0, (1,)))
    task = magi.Magi1Task(CHANNELS, pool, tokens=192, phases=phases)
    task.pools["clips"] = task.pools["pictures"] = LatentPool(pool)
    return task


@pytest.fixture(scope="module")
def drawn(task):
    clean = torch.randn(4000, 1, 4 * FRAMES, 2, 2, generator=torch.Generator().manual_seed(0))
    later = torch.arange(4000) % 4 == 0
    return clean, later, *task.draw_batch(clean, later, torch.Generator().manual_seed(1))


def test_times_rise_towards_older_chunks_as_in_the_window(drawn):
    _, later, batch, *_ = drawn
    active = batch.time != torch.tensor(SAMPLING.clean_t)
    assert batch.time.min() >= 0 and batch.time.max() <= 1
    assert active[:, -1].all() and not active[later, 0].any() and active[~later, 0].any()
    # Half of the windows, and some of the others by chance, are as in the sampler: a stage apart in the even schedule.
    step = torch.searchsorted(timesteps(SAMPLING.num_steps), batch.time)
    apart = ((step[:, :-1] - step[:, 1:] - SAMPLING.steps_per_stage).abs() <= 1) | ~active[:, :-1]
    assert 0.5 < apart.all(dim=1).float().mean() < 0.62


def test_latents_lie_between_noise_and_clip_by_their_time_or_are_given(drawn):
    clean, _, batch, noise, denoised = drawn
    t = batch.time.repeat_interleave(FRAMES, 1)[:, None, :, None, None]
    at_time = torch.isclose(batch.latents, noise + t * (clean - noise), atol=1e-5).flatten(3).all(3)[:, 0]
    given = (batch.latents == clean).flatten(3).all(3)[:, 0] & ~at_time
    assert (at_time | given).all()
    assert not denoised[given].any()
    assert given.any(dim=1).float().mean() == pytest.approx(magi.PREFIX_SHARE, abs=0.02)
    # They are the first one or two frames of the first chunk that is being denoised.
    first = (batch.time != torch.tensor(SAMPLING.clean_t)).int().argmax(dim=1)
    for sample in given.any(dim=1).nonzero()[:, 0].tolist():
        frames = given[sample].nonzero()[:, 0].tolist()
        assert frames in [[first[sample] * FRAMES + i for i in range(n)] for n in (1, 2)]


def test_passes_are_dropped_as_the_guidance_needs_them(drawn):
    batch = drawn[2]
    active = batch.time != torch.tensor(SAMPLING.clean_t)
    assert not batch.uses_text[~active].any()
    assert not (batch.uses_text & ~batch.text_gate).any()
    without = ~batch.uses_text.any(dim=1)
    assert without.float().mean() == pytest.approx(magi.CAPTION_DROPOUT, abs=0.02)
    assert not batch.text_gate[without].any()
    # In a pass with text all noisy chunks have it, and finished ones have its gates in one step of a stage.
    assert (batch.uses_text == active)[~without].all()
    finished = batch.text_gate[~without][~active[~without]].float().mean()
    assert finished == pytest.approx(1 / SAMPLING.steps_per_stage, abs=0.03)


def test_loss_reaches_every_weight(task):
    model = task.model["transformer"]
    for zero in (
        model.final_linear.linear,
        *(layer.ada_modulate_layer.proj[0] for layer in model.videodit_blocks.layers),
    ):
        nn.init.normal_(zero.weight, std=0.02)
    for step in range(12):
        loss = task.loss(step, 0.6 if step < 10 else 0.0, 0, 1)  # clips, then pictures
        loss.backward()
        assert loss.isfinite()
    silent = [
        name
        for name, p in task.model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]
    assert not silent
    assert task.is_hidden_matrix("transformer.videodit_blocks.layers.0.mlp.linear_fc1.weight")
    assert not task.is_hidden_matrix("transformer.videodit_blocks.layers.0.ada_modulate_layer.proj.0.weight")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10((a.clamp(-1, 1) - b).square().mean() / 4).item()


@torch.no_grad()
def test_autoencoder_starts_as_a_linear_code(codec):
    video = pixels("heldout", [0, 1], 24, 64)
    assert psnr(codec.decode(codec.encode(video)), video) > 34
    values = vit_codec.patches(video[:, :, :4, :4, :8])
    assert values.shape == (4, vit_codec.PATCH_VALUES)
    torch.testing.assert_close(values[1].view(4, 4, 4, 3), video[0, :, :4, :4, 4:8].permute(1, 2, 3, 0))


@torch.no_grad()
def test_measured_codec_has_unit_latents_and_the_same_frames():
    torch.manual_seed(0)
    codec = ViTCodec.build()
    video = pixels("heldout", [0, 1], 12, 64)
    before = codec.decode(codec.encode(video))
    codec.measure(clips=4, size=64)
    torch.testing.assert_close(codec.decode(codec.encode(video)), before, atol=1e-3, rtol=0)
    latents = torch.cat([codec.encode(pixels("vae", [i], 24, 64)).transpose(0, 1).flatten(1) for i in range(4)], dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(CHANNELS), atol=1e-3, rtol=0)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.01)


def test_reconstruction_cuts_clips_and_has_gradients(codec):
    task = ReconstructionTask(ViTCodec(codec.model))
    for step in range(3):
        task.loss(step, 0.5, 0, 1).backward()
    silent = [n for n, p in task.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    lengths = {tuple(vit_codec._lengths(torch.Generator().manual_seed(seed))) for seed in range(30)}
    assert lengths == set(vit_codec.TILINGS)


def test_grammar_survives_the_pipelines_cleaning():
    tokenizer = text.build_tokenizer()
    encoder = text.build_text_encoder(T5EncoderModel, len(tokenizer)).eval()
    captions = procedural.prompts("choosing", 4)
    with torch.no_grad():
        features, mask = text.encode(captions, tokenizer, encoder, 52)
    for caption_, ours, present in zip(captions, features, mask, strict=True):
        theirs, theirs_mask = encode_prompt(caption_, tokenizer, encoder, 52)
        assert theirs_mask.sum() == present.sum()
        torch.testing.assert_close(theirs[: present.sum()], ours[present], atol=1e-5, rtol=1e-5)


def test_export_is_a_pipeline_that_makes_videos(tmp_path, task, codec):
    export_magi(tmp_path, task.model, task.tokenizer, codec.model, SAMPLING)
    pipeline = Magi1Pipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.sampling == SAMPLING
    assert pipeline.tiling(pipeline.sampling) == codec.tiling
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.transformer.config.caption_max_length == NULL_TOKENS + 2
    few = SAMPLING.replace(num_steps=2, window_size=2, noise2clean_kvrange=(2, 1))
    prompt = procedural.prompts("choosing", 1)[0]
    frames = pipeline(prompt, height=32, width=32, num_frames=24, sampling=few, output_type="np").frames
    assert frames.shape == (1, 24, 32, 32, 3)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 5.95e6


def test_families_differ_only_by_what_the_stages_ask_for():
    for family in FAMILIES.values():
        assert set(family.frames) == {phase.pool for phase in PHASES}
    magi_frames = FAMILIES["magi"].frames
    assert magi_frames["pictures"] == vit_codec.PATCH
    assert all(magi_frames[phase.pool] % vit_codec.TILE_FRAMES == 0 for phase in PHASES if phase.windows)


def test_stages_say_what_is_missing(tmp_path):
    run = Run("magi", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--stage latents"):
        train_generator(run, TrainConfig(1.0, 1e-3))
    with pytest.raises(UserError, match="train the generator first"):
        export_generator(run)
