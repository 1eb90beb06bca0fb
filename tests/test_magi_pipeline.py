"""The MAGI-1 pipeline: text, image and video in, chunks out, and the folder it is saved in."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from common.errors import UserError
from magi1_motioncache import ExactDenoiser, Magi1Pipeline, SamplingConfig, SpecialTokenOptions
from magi1_motioncache.vae import AutoencoderViTMagi1
from tests.magi_cases import parameters, special_tokens, transformer

SIZE = {"height": 48, "width": 64}
SAMPLING = SamplingConfig(num_steps=4, window_size=2, chunk_width=2, noise2clean_kvrange=(2, 1))


@pytest.fixture(scope="module")
def pipeline() -> Magi1Pipeline:
    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2, "lake": 3, "cat": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = parameters("weights_vae")["ddconfig"] | {"z_chans": 16, "patch_size": 8, "video_size": 64, "embed_dim": 256}
    pipe = Magi1Pipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        ),
        text_encoder=T5EncoderModel(config).eval(),
        transformer=transformer("A"),
        vae=AutoencoderViTMagi1(sizes).eval(),
        special_tokens=special_tokens(),
        sampling=SAMPLING.to_dict(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_text_to_video(pipeline):
    options = {**SIZE, "num_frames": 14, "output_type": "pt"}
    frames = pipeline("A lake", generator=seeded(), **options).frames
    assert frames.shape == (1, 16, 3, 48, 64)  # 14 frames are 3 latent frames, filled up to two chunks
    assert torch.equal(pipeline("A lake", generator=seeded(), **options).frames, frames)
    assert not torch.equal(pipeline("A cat", generator=seeded(), **options).frames, frames)
    plain = pipeline("A lake", generator=seeded(), special_tokens=SpecialTokenOptions(), **options).frames
    assert not torch.equal(plain, frames)


def test_chunks_come_one_by_one(pipeline):
    options = {**SIZE, "num_frames": 24, "generator": seeded()}
    asked = []

    class Watched(ExactDenoiser):
        def predict(self, call, latents):
            asked.append(call.iteration)
            return super().predict(call, latents)

    stream = pipeline.stream("lake", denoiser=Watched, **options)
    first = next(stream)
    steps = max(asked)
    rest = list(stream)
    assert [first.index, *(chunk.index for chunk in rest)] == [0, 1, 2]
    assert steps < max(asked)
    latents = torch.cat([chunk.latents for chunk in (first, *rest)], dim=2)
    whole = pipeline("lake", **{**options, "generator": seeded()}, output_type="latent").frames
    assert torch.equal(latents, whole)
    assert first.frames.shape == (1, 3, 8, 48, 64)


def test_saved_folder_gives_the_same_video(pipeline, tmp_path):
    options = {**SIZE, "num_frames": 8, "output_type": "latent"}
    before = pipeline("lake", generator=seeded(), **options).frames
    pipeline.save_pretrained(tmp_path)
    loaded = Magi1Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.sampling == SAMPLING
    assert torch.equal(loaded("lake", generator=seeded(), **options).frames, before)


def test_image_to_video(pipeline):
    image = Image.new("RGB", (100, 50), (200, 30, 60))
    chunks = list(pipeline.stream("lake", image=image, num_frames=12, generator=seeded(), **SIZE))
    assert [chunk.frames.shape[2] for chunk in chunks] == [8, 8]
    other = list(pipeline.stream("lake", image=Image.new("RGB", (100, 50)), num_frames=12, generator=seeded(), **SIZE))
    assert not torch.equal(chunks[-1].latents, other[-1].latents)


def test_video_to_video(pipeline):
    video = torch.rand(1, 12, 3, 48, 64, generator=seeded())
    chunks = list(pipeline.stream("lake", video=video, num_frames=12, generator=seeded(), **SIZE))
    # Three latent frames are given: one whole chunk and half of the next, of which the new half is handed out.
    assert [chunk.frames.shape[2] for chunk in chunks] == [4, 8]
    assert [chunk.index for chunk in chunks] == [0, 1]


def test_options_of_one_video(pipeline):
    faster = SAMPLING.replace(num_steps=2)
    options = {**SIZE, "num_frames": 8, "output_type": "latent"}
    few = pipeline("lake", generator=seeded(), sampling=faster, **options).frames
    assert not torch.equal(few, pipeline("lake", generator=seeded(), **options).frames)
    base = SAMPLING.replace(cfg_number=3, distill=False)
    assert torch.isfinite(pipeline("lake", generator=seeded(), sampling=base, **options).frames).all()


def test_features_instead_of_a_prompt(pipeline):
    features, mask = pipeline.encode_prompt("lake")
    options = {**SIZE, "num_frames": 8, "output_type": "latent"}
    given = pipeline(prompt_features=features, prompt_mask=mask, generator=seeded(), **options).frames
    assert torch.equal(given, pipeline("lake", generator=seeded(), **options).frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 50}, "multiples of 16"),
        ({"num_frames": 2}, "less than one latent frame"),
        ({"output_type": "gif"}, "not one of"),
        ({"prompt": None}, "either a prompt or"),
        ({"prompt": None, "prompt_features": torch.zeros(4, 32)}, "one entry per token"),
        ({"image": Image.new("RGB", (8, 8)), "video": torch.zeros(1, 4, 3, 48, 64)}, "both given"),
        ({"video": torch.zeros(1, 5, 3, 48, 64)}, "multiple of 4"),
        ({"latents": torch.zeros(1, 16, 2, 6, 6)}, "for a video of"),
    ],
)
def test_inputs_that_do_not_fit(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": "lake", **SIZE, "num_frames": 8, **options})


def test_without_text_encoder(pipeline):
    pipe = Magi1Pipeline(None, None, pipeline.transformer, pipeline.vae, sampling=SAMPLING.to_dict())
    with pytest.raises(UserError, match="no text encoder"):
        pipe("lake", **SIZE)
    with pytest.raises(UserError, match="special caption tokens are asked for"):
        pipe(
            prompt_features=torch.zeros(4, 32),
            prompt_mask=torch.ones(4),
            special_tokens=SpecialTokenOptions(duration=True),
            **SIZE,
        )
