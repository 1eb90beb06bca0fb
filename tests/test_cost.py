"""FLOPs: the published figure of the vanilla model, the exact mode's, and agreement with PyTorch's own counter."""

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from skyreels_random import TEXT_TOKENS, random_pipeline
from torch.utils.flop_counter import FlopCounterMode

from common.cache import MotionCacheConfig, Record, Trace
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.plan import WindowPlan

STEPS, AR_STEP, BLOCK, TOKENS_PER_FRAME = 50, 5, 5, 2040  # 544x960


@pytest.fixture(scope="module")
def paper_cost():
    with torch.device("meta"):
        model = SkyReelsV2Transformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=30,
            inject_sample_info=True,
            num_frame_per_block=BLOCK,
        )
    return model_cost(model)


def paper_windows() -> list[WindowPlan]:
    """The two windows of 177 frames with base 97 and overlap 17: 25 latent frames each, the second with 5 given."""
    plans = []
    for given in (0, 5):
        matrices = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
            None, 25, torch.linspace(999, 20, STEPS).long(), 25, AR_STEP, given, BLOCK
        )
        plans.append(WindowPlan.from_matrices(*matrices, STEPS, 25, given, BLOCK))
    return plans


def test_stock_model_at_paper_scale_is_113_pflops(paper_cost):
    forwards = 2 * sum(plan.iterations for plan in paper_windows())
    assert forwards == 270
    assert forwards * paper_cost.window_forward(5, 5 * TOKENS_PER_FRAME) / 1e15 == pytest.approx(113.4, abs=0.1)
    masked_too = paper_cost.window_forward(1, 25 * TOKENS_PER_FRAME)
    assert forwards * masked_too / 1e15 == pytest.approx(165.2, abs=0.1)


def test_exact_mode_at_paper_scale(paper_cost):
    """79.6 PFLOPs for given frames once and the chunks being denoised, 1.1 more to renew the K/V of finished chunks."""
    tokens = BLOCK * TOKENS_PER_FRAME
    records = []
    for window, plan in enumerate(paper_windows()):
        for branch in ("cond", "uncond"):
            clean: set[int] = set()
            for i in range(plan.iterations):
                for chunk in plan.work(i, clean):
                    role = "denoise"
                    if plan.status(i, chunk) == "finished":
                        clean.add(chunk)
                        role = "refresh"
                    kv = (chunk + 1) * tokens
                    records.append(Record(window, i, chunk, branch, 0, role, "full", tokens, tokens, kv))
    without_refresh = [r for r in records if r.role == "denoise" or (r.window == 1 and r.chunk == 0)]
    assert paper_cost.trace_flops(Trace(records=without_refresh)) / 1e15 == pytest.approx(79.6, abs=0.1)
    assert paper_cost.trace_flops(Trace(records=records)) / 1e15 == pytest.approx(80.6, abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "exact"},
        {"budget": 0.4, "chunk_phase": 1, "warmup_steps": 2},
        {"budget": 0.4, "chunk_phase": 1, "warmup_steps": 2, "kv_budget": 1},
    ],
    ids=str,
)
def test_trace_flops_equal_a_flop_counter(settings):
    pipe, call = random_pipeline(fps=True)
    handle = apply_motioncache(pipe, MotionCacheConfig(distance="input").replace(**settings))
    kv_budget = settings.get("kv_budget")
    # The counter knows no fused attention on a CPU.
    with attention_backend("_native_math"), FlopCounterMode(display=False) as counter:
        call()
    remove_motioncache(pipe)
    cost = model_cost(pipe.transformer, text_tokens=TEXT_TOKENS)
    # Scoring clean K/V, once per chunk, is half an attention; it is told apart.
    merged = [r for r in handle.trace.records if r.role == "refresh" and r.kv_tokens > r.tokens] if kv_budget else []
    scoring = sum(r.tokens * r.kv_tokens * cost.attention_per_pair / 2 for r in merged)
    assert cost.trace_flops(handle.trace) + scoring == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert bool(merged) == bool(kv_budget)
