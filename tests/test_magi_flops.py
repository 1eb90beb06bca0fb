"""Operation counts: against torch's own counter, and against the totals known for the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cache import KVCache, Record, Trace, Write
from magi1_motioncache.captions import NULL_TOKENS
from magi1_motioncache.flops import Flops, forward_flops, trace_flops
from magi1_motioncache.kv_cache import ChunkView
from magi1_motioncache.plan import ChunkCall, Role, SamplingPlan
from magi1_motioncache.presets import VARIANTS
from magi1_motioncache.transformer import Magi1Transformer3DModel
from tests.magi_cases import transformer

PETA = 1e15
CAPTION = 102  # 100 tokens of text and two special ones


@pytest.fixture(scope="module")
def config():
    with torch.device("meta"):
        return dict(Magi1Transformer3DModel(**VARIANTS["4.5B_distill"].transformer).config)


def forwards_of(plan: SamplingPlan) -> list[ChunkCall]:
    """All that a video takes without any caching."""
    return [call for calls in plan.iterations() for call in calls]


def cost(config, call: ChunkCall, tokens: int) -> Flops:
    """Of one forward of a distilled model's chunk of `tokens` tokens."""
    return forward_flops(config, tokens, call.kv_chunks * tokens, CAPTION if call.uses_text else NULL_TOKENS, True)


@pytest.mark.parametrize(
    ("frames", "steps", "ranges", "forwards", "pairs", "a", "b", "c", "d"),
    [
        (168, 64, (5, 4, 3, 2), (448, 6, 112), (1248, 6, 112), 140.48, 140.15, 139.19, 122.18),
        (240, 64, (), (640, 9, 160), (3520, 45, 160), 310.12, 309.64, 305.98, 283.97),
        (240, 16, (), (160, 9, 40), (880, 45, 40), 80.28, 80.16, 76.49, 73.74),
    ],
)
def test_totals_of_the_published_size(config, frames, steps, ranges, forwards, pairs, a, b, c, d):
    sampling = VARIANTS["4.5B_distill"].sampling.replace(num_steps=steps, noise2clean_kvrange=ranges)
    calls = forwards_of(SamplingPlan.for_frames(sampling, frames))
    roles = [[call for call in calls if call.role is role] for role in (Role.DENOISE, Role.CLEAN, Role.NEAR)]
    assert tuple(map(len, roles)) == forwards
    assert tuple(sum(call.kv_chunks for call in of) for of in roles) == pairs
    costs = [(call.role, cost(config, call, 6 * 45 * 45)) for call in calls]
    # The known total projects all 800 rows of a padded caption; here padding never enters the model.
    assert sum(flops.total for _, flops in costs) / PETA == pytest.approx(a, rel=1e-4)
    for without, expected in ((None, b), (Role.CLEAN, c), (Role.NEAR, d)):
        blocks = sum(flops.blocks for role, flops in costs if role is not without)
        assert blocks / PETA == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("shortcut", [None, 4.0])
@pytest.mark.parametrize("gated", [False, True])
def test_against_the_counter_of_torch(shortcut, gated):
    options = dict(transformer("A").config) | {"gated_linear_unit": gated, "half_channel_vae": gated}
    options |= {"in_channels": 32, "out_channels": 32} if gated else {}
    model = Magi1Transformer3DModel(**options).requires_grad_(False)
    size = options["num_layers"], options["num_query_groups"], options["kv_channels"]
    cache, caption = KVCache(*size), torch.randn(1, 7, model.config.caption_channels)
    for chunk in range(2):
        view = ChunkView(cache, Write(24 * chunk, 24))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 16, 2, 6, 8), torch.tensor([0.5]), caption, 2 * chunk, view, shortcut=shortcut)
    assert counter.get_total_flops() == forward_flops(model.config, 24, 48, 7, shortcut is not None).total


def test_fewer_tokens_cost_less(config):
    full = forward_flops(config, 12150, 24300, CAPTION, True)
    half = forward_flops(config, 6075, 24300, CAPTION, True, context_tokens=12150)
    assert half.blocks * 2 == full.blocks
    assert half.embedders == full.embedders


def test_a_trace_in_which_all_is_computed_costs_what_its_plan_does(config):
    sampling = VARIANTS["4.5B_distill"].sampling.replace(num_steps=8)
    plan = SamplingPlan.for_frames(sampling, 72)
    tokens = 6 * 4 * 4
    trace = Trace()
    for call in forwards_of(plan):
        role = "refresh" if call.role is Role.CLEAN else "denoise"
        branch = "near" if call.role is Role.NEAR else "text"
        trace.records.append(
            Record(0, 0, call.chunk, branch, call.step, role, "full", tokens, tokens, call.kv_chunks * tokens)
        )
    known, whole = set(), 0
    for call in forwards_of(plan):
        caption = call.chunk if call.uses_text else None
        length = CAPTION if call.uses_text else NULL_TOKENS
        keys = call.kv_chunks * tokens
        whole += forward_flops(config, tokens, keys, length, True, knows_caption=caption in known).total
        known.add(caption)
    assert known == {None, *range(plan.num_chunks)}
    assert trace_flops(config, trace, CAPTION, True) == whole
    for record in trace.records:
        record.tokens = 0
    ends = sum(forward_flops(config, 0, 0, 0, True, tokens).total for _ in trace.records)
    assert ends < trace_flops(config, trace, CAPTION, True) < 0.01 * whole
