"""The MAGI-1 transformer and sampler beyond the reference numbers: what must break them, subsets, memory, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from common.cache import KVCache, Write
from common.errors import UserError
from magi1_motioncache import attention, sampler
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.guidance import pass_weights, without_unused
from magi1_motioncache.kv_cache import ChunkView, OwnKeysOnly
from magi1_motioncache.plan import Pass, Role, SamplingPlan
from magi1_motioncache.presets import VARIANTS, variant
from magi1_motioncache.rope import RotaryPositions
from magi1_motioncache.sampler import Magi1Sampler
from magi1_motioncache.schedule import timesteps
from magi1_motioncache.transformer import ChunkInputs, Magi1Transformer3DModel
from tests.magi_cases import Case, cases, relative_error, tensors, transformer

DISTILLED_RUN = "s01_t2v_A_distill_w4_6chunks"
BASE_RUN = "s08_t2v_A_base_cfg3"
WRONG = 1e-2  # a fault shows at least this, as a share of the largest value; rounding stays below 1e-5


def run(name: str, denoiser_class: type[ExactDenoiser] = ExactDenoiser) -> tuple[torch.Tensor, ExactDenoiser]:
    case = Case(name)
    denoiser = denoiser_class(case.transformer, case.captions, case.plan)
    video = Magi1Sampler(case.plan, tensors("noise")[case.parameters["noise_key"]], case.prefix)
    list(video.run(denoiser))
    return video.latents, denoiser


def error_of(name: str, denoiser_class: type[ExactDenoiser] = ExactDenoiser) -> float:
    return relative_error(run(name, denoiser_class)[0], tensors(name)["xs_final"])


@pytest.mark.skipif(DISTILLED_RUN not in cases("run"), reason="needs the reference run s01")
class TestFaultsShow:
    """The reference run is sensitive to the facts that are easiest to get wrong."""

    def test_without_the_clean_pass(self):
        class StaleKeys(ExactDenoiser):
            def predict(self, call, latents):
                if call.role is Role.CLEAN:
                    return latents
                return super().predict(call, latents)

        assert error_of(DISTILLED_RUN, StaleKeys) > WRONG

    def test_with_keys_of_noisy_text_in_the_clean_pass(self):
        class CleanAtNoise(ExactDenoiser):
            def predict(self, call, latents):
                if call.role is Role.CLEAN:
                    call = dataclasses.replace(call, t=0.5)
                return super().predict(call, latents)

        assert error_of(DISTILLED_RUN, CleanAtNoise) > WRONG

    def test_with_rotary_positions_that_start_over(self, monkeypatch):
        forward = RotaryPositions.forward
        monkeypatch.setattr(RotaryPositions, "forward", lambda self, first, *grid: forward(self, first % 4, *grid))
        assert error_of(DISTILLED_RUN) > WRONG

    def test_with_attentions_side_by_side(self, monkeypatch):
        monkeypatch.setattr(attention, "interleave", lambda a, b: torch.cat([a, b], dim=-1))
        assert error_of(DISTILLED_RUN) > WRONG

    def test_with_the_threshold_in_double_precision(self, monkeypatch):
        case = Case(DISTILLED_RUN)
        later = case.sampling.replace(nearly_clean_threshold=case.sampling.nearly_clean_threshold + 1e-6)
        monkeypatch.setattr(Case, "sampling", later)
        assert error_of(DISTILLED_RUN) > WRONG


@pytest.mark.skipif(BASE_RUN not in cases("run"), reason="needs the reference run s08")
def test_skipped_passes_change_nothing(monkeypatch):
    class Counting(ExactDenoiser):
        calls = 0

        def predict(self, call, latents):
            type(self).calls += 1
            return super().predict(call, latents)

    pruned, _ = run(BASE_RUN, Counting)
    few, Counting.calls = Counting.calls, 0
    monkeypatch.setattr(sampler, "without_unused", lambda config, calls: list(calls))
    everything, _ = run(BASE_RUN, Counting)
    assert few < Counting.calls
    assert relative_error(pruned, everything) < 1e-6


def test_unused_passes():
    config = VARIANTS["4.5B_base"].sampling.replace(num_steps=8)
    plan = SamplingPlan(config, num_chunks=6)
    for calls in plan.iterations():
        kept = without_unused(config, calls)
        assert [c for c in kept if c.branch is Pass.NULL] == [c for c in calls if c.branch is Pass.NULL]
        for call in kept:
            if call.branch is Pass.UNCOND:
                assert pass_weights(config, call.t).uncond
        text = [call for call in kept if call.branch is Pass.TEXT]
        weighty = [c for c in calls if c.branch is Pass.TEXT and c.role is Role.DENOISE and c.t < 0.3]
        reach = min((c.kv_start for c in weighty), default=None)
        for call in weighty:
            assert call in text
        assert not text or reach is not None
    assert not [c for c in without_unused(config, list(plan.iterations())[-1]) if c.branch is not Pass.NULL]


def test_weights_of_the_passes():
    config = VARIANTS["4.5B_base"].sampling
    for t in (0.0, 0.05, timesteps(64)[32].item(), 0.2):
        weights = pass_weights(config, t)
        assert (weights.text, weights.null, weights.uncond) == ((7.5, -6.0, -0.5) if t <= 0.3 else (0, 1, 0))
    at_threshold = pass_weights(config, timesteps(64)[48].item())
    assert (at_threshold.text, at_threshold.null, at_threshold.uncond) == (0, 1, 0)


@pytest.mark.skipif(DISTILLED_RUN not in cases("run"), reason="needs the reference run s01")
def test_keys_are_freed_when_out_of_reach():
    held = []

    class Watching(ExactDenoiser):
        def predict(self, call, latents):
            velocity = super().predict(call, latents)
            held.append(self.caches[Pass.TEXT.value].length((call.chunk + 1) * self._chunk_tokens) / self._chunk_tokens)
            return velocity

    plan = Case(DISTILLED_RUN).plan
    run(DISTILLED_RUN, Watching)
    assert min(held) == 1 and max(held) == plan.most_chunks(Pass.TEXT.value) < plan.num_chunks


def kv_cache(model):
    return KVCache(model.config.num_layers, model.config.num_query_groups, model.config.kv_channels)


TOKENS = 24  # of a chunk of 2 latent frames of 6 by 8


@pytest.fixture
def chunk():
    model = transformer("A")
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, model.latent_channels, 2, 6, 8, generator=generator) for _ in range(2)]
    caption = torch.randn(1, 5, model.config.caption_channels, generator=generator)
    cache = kv_cache(model)
    model(latents[0], torch.tensor([0.5]), caption, 0, ChunkView(cache, Write(0, TOKENS)))
    rope, condition = model.rope(2, 2, 3, 4), model.condition(torch.tensor([0.2]), has_text=True)
    inputs = ChunkInputs(model.embed(latents[1]), rope, condition, model.captions(caption), (2, 3, 4))
    return model, inputs, cache


def test_some_tokens_of_a_chunk(chunk):
    model, inputs, cache = chunk
    full = model.run_blocks(inputs, ChunkView(cache, Write(TOKENS, TOKENS)))
    tokens = torch.tensor([3, 0, 17, 23])
    some = model.run_blocks(inputs.select(tokens), ChunkView(cache, Write(TOKENS, TOKENS, tokens)))
    assert relative_error(some, full[:, tokens]) < 1e-5
    assert relative_error(model.head(some), model.head(full)[:, tokens]) < 1e-5


def test_some_tokens_need_a_whole_chunk_first(chunk):
    model, inputs, cache = chunk
    tokens = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="never written whole"):
        model.run_blocks(inputs.select(tokens), ChunkView(cache, Write(TOKENS, TOKENS, tokens)))


def test_gradients_reach_every_parameter():
    model = Magi1Transformer3DModel(**{**transformer("A").config, "caption_max_length": 8})
    caption = torch.randn(1, 3, model.config.caption_channels)
    velocity = model(torch.randn(1, 16, 2, 6, 8), torch.tensor([0.3]), caption, 2, OwnKeysOnly())
    velocity.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "parameters", "count"), [("4.5B_base", 4459898128, 898), ("24B_base", 23899281936, 1262)]
)
def test_published_sizes(name, parameters, count):
    options = variant(name).transformer
    with torch.device("meta"):
        model = Magi1Transformer3DModel(**options)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == count
    hidden, condition = options["hidden_size"], options["hidden_size"] // 4
    channels, inner = (32, 32768) if "24B" in name else (16, 12288)
    expected = {
        "x_embedder.weight": (hidden, channels, 1, 2, 2),
        "t_embedder.mlp.0.weight": (condition, 256),
        "t_embedder.mlp.2.bias": (condition,),
        "y_embedder.null_caption_embedding": (800, 4096),
        "y_embedder.y_proj_xattn.0.weight": (hidden, 4096),
        "y_embedder.y_proj_adaln.0.weight": (condition, 4096),
        "rope.bands": (16,),
        "videodit_blocks.final_layernorm.weight": (hidden,),
        "final_linear.linear.weight": (4 * channels, hidden),
    }
    layer = {
        "ada_modulate_layer.proj.0.weight": (2 * hidden, condition),
        "ada_modulate_layer.proj.0.bias": (2 * hidden,),
        "self_attention.linear_qkv.layer_norm.bias": (hidden,),
        "self_attention.linear_qkv.q.weight": (hidden, hidden),
        "self_attention.linear_qkv.qx.weight": (hidden, hidden),
        "self_attention.linear_qkv.k.weight": (1024, hidden),
        "self_attention.linear_qkv.v.weight": (1024, hidden),
        "self_attention.linear_kv_xattn.weight": (2048, hidden),
        "self_attention.linear_proj.weight": (hidden, 2 * hidden),
        "self_attention.q_layernorm.weight": (128,),
        "self_attention.k_layernorm_xattn.bias": (128,),
        "self_attn_post_norm.weight": (hidden,),
        "mlp_post_norm.bias": (hidden,),
        "mlp.layer_norm.weight": (hidden,),
        "mlp.linear_fc1.weight": (inner, hidden),
        "mlp.linear_fc2.weight": (hidden, options["ffn_hidden_size"]),
    }
    last = options["num_layers"] - 1
    expected |= {f"videodit_blocks.layers.{last}.{key}": shape for key, shape in layer.items()}
    assert {key: state.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 10, "window_size": 4}, "not divisible by window_size 4"),
        ({"num_steps": 12, "window_size": 3}, "use 1, 2 or 4"),
        ({"num_steps": 8, "noise2clean_kvrange": (3, 2, 1)}, "3 entries"),
        ({"noise2clean_kvrange": (0,)}, "attends to itself"),
        ({"clean_chunk_kvrange": 0}, "neither -1 nor at least 1"),
        ({"cfg_number": 2}, "neither 1"),
        ({"shortcut_mode": "4,4,4"}, "not one of"),
        ({"text_scales": (1.0,)}, "same number"),
        ({"cfg_t_range": (0.1, 0.2, 0.3, 0.4, 0.5)}, "start at 0"),
        ({"cfg_t_range": (0, 0.2, 0.1, 0.4, 0.5)}, "and rise"),
        ({"cfg_t_range": (0, 0.1, 0.5, 2, 3)}, "to 1 at most"),
        ({"cfg_t_range": (0, math.nan, 0.5, 0.6, 0.7)}, "and rise"),
        ({"prev_chunk_scales": (math.inf, 1, 1, 1, 1)}, "prev_chunk_scales .* must be finite"),
        ({"text_scales": (1, 1, math.nan, 1, 1)}, "text_scales .* must be finite"),
        ({"nearly_clean_threshold": math.inf}, "must be a finite number"),
        ({"clean_t": -3}, "clean_t: -3 is outside its range; allowed: 0 to 1"),
        ({"clean_t": 5}, "clean_t: 5 is outside"),
        ({"clean_t": math.nan}, "clean_t: nan is outside"),
        ({"nearly_clean_scale": 900}, "nearly_clean_scale: 900 is outside its range; allowed: 0 to 1"),
        ({"chunk_width": 0}, "at least 1"),
    ],
)
def test_sampling_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


def test_sampling_options_as_data():
    config = VARIANTS["24B_base"].sampling
    assert SamplingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="unknown sampling option 'steps'"):
        SamplingConfig.from_dict({"steps": 3})


def test_inputs_that_do_not_fit():
    model = transformer("A")
    caption = torch.zeros(1, 1, model.config.caption_channels)
    with pytest.raises(UserError, match="even sides"):
        model(torch.zeros(1, 16, 2, 5, 8), torch.zeros(1), caption, 0, OwnKeysOnly())
    with pytest.raises(UserError, match="rotary scale"):
        model(torch.zeros(1, 16, 2, 2, 8), torch.zeros(1), caption, 0, OwnKeysOnly())
    with pytest.raises(UserError, match="make 64, not 128"):
        Magi1Transformer3DModel(hidden_size=128, num_attention_heads=4, kv_channels=16)
    with pytest.raises(UserError, match="divide among"):
        Magi1Transformer3DModel(hidden_size=128, num_attention_heads=4, num_query_groups=3, kv_channels=32)
    with pytest.raises(UserError, match="multiples of 8"):
        Magi1Transformer3DModel(hidden_size=48, num_attention_heads=4, num_query_groups=4, kv_channels=12)
    plan = SamplingPlan(SamplingConfig(), num_chunks=2)
    with pytest.raises(UserError, match="latent frames for a plan of 12"):
        Magi1Sampler(plan, torch.zeros(1, 16, 6, 6, 8))
    with pytest.raises(UserError, match="prefix of 1"):
        Magi1Sampler(plan, torch.zeros(1, 16, 12, 6, 8), torch.zeros(1, 16, 1, 6, 8))
    with pytest.raises(UserError, match="nothing to generate"):
        SamplingPlan(SamplingConfig(), num_chunks=2, prefix_frames=12)
    with pytest.raises(UserError, match="less than one latent frame"):
        SamplingPlan.for_frames(SamplingConfig(), 3)
    with pytest.raises(UserError, match="unknown MAGI-1 variant"):
        variant("7B")
