"""The parts of the engine against the papers' equations, by hand or by a second way of computing them."""

import math

import numpy as np
import pytest
import torch

from common.cache import MotionCacheConfig, Record, Trace
from common.cache.distance import joint_relative_l1, log_snr, relative_l1, rescale, table_entry
from common.cache.mask import bucketed, graded, most_urgent, temporal_vote
from common.cache.motion import motion_map, motion_weights
from common.cache.residual import ReuseBuffer
from common.errors import UserError

GRID = (3, 2, 2)


def test_motion_map_of_equation_9():
    frames = torch.tensor([[1.0, 1, 1, 1], [2, 1, 1, 1], [2, 4, 1, 1]])  # one channel
    x = frames.reshape(1, 12, 1)
    inside = torch.tensor([[1.0, 0, 0, 0], [0, 3, 0, 0]])
    torch.testing.assert_close(motion_map(x, GRID, None, relative=False), torch.cat([inside[:1], inside]))
    before = torch.tensor([1.0, 1, 1, 3]).reshape(1, 4, 1)
    expected = torch.cat([torch.tensor([[0.0, 0, 0, 2]]), inside])
    torch.testing.assert_close(motion_map(x, GRID, before, relative=False), expected)
    divided = expected / torch.tensor([[1.0, 1, 1, 3], [1, 1, 1, 1], [2, 1, 1, 1]])
    torch.testing.assert_close(motion_map(x, GRID, before, relative=True), divided)


def test_motion_map_of_a_single_frame():
    x = torch.randn(1, 4, 5)
    assert motion_map(x, (1, 2, 2), None, relative=True).eq(0).all()
    assert motion_map(x, (1, 2, 2), torch.randn(1, 4, 5), relative=True).gt(0).all()


def test_motion_weights_of_equation_10():
    scores = torch.tensor([[0.0, 1, 2, 4], [5, 5, 5, 5]])
    weights = motion_weights(scores, alpha=0.6)
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.7, 0.8, 1.0, 0.6, 0.6, 0.6, 0.6]))
    assert motion_weights(scores, alpha=1.0).eq(1).all()


def test_temporal_vote_wants_more_than_half():
    wanted = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    voted = temporal_vote(wanted.flatten(), 3).view(3, 4)
    assert voted.eq(torch.tensor([True, True, False, False])).all()
    two_of_four = torch.tensor([1, 1, 0, 0]).bool()
    assert not temporal_vote(two_of_four, 4).any()


def test_most_urgent_puts_wanted_tokens_first():
    urgency = torch.tensor([5.0, -1, 3, 4, -2])
    wanted = torch.tensor([0, 1, 0, 0, 1]).bool()
    assert most_urgent(urgency, 2, wanted).tolist() == [1, 4]
    assert most_urgent(urgency, 3, wanted).tolist() == [0, 1, 4]
    assert most_urgent(urgency, 2).tolist() == [0, 3]


def test_bucketed():
    assert [bucketed(n, 4, 10) for n in (1, 4, 5, 9)] == [4, 4, 8, 10]


def test_graded_thresholds_rise_over_the_first_four_chunks():
    assert [graded(0.6, place) for place in range(6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 1.6, 1.6])
    assert [graded(0.0, place) for place in range(6)] == [1.0] * 6


def test_distances():
    a, b = torch.tensor([1.0, -2, 3]), torch.tensor([2.0, -2, 2])
    assert relative_l1(a, b) == pytest.approx(2 / 6)
    coefficients = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2)
    assert rescale(torch.tensor(0.05), coefficients) == pytest.approx(np.poly1d(coefficients)(0.05), rel=1e-4)
    assert rescale(torch.tensor(0.0), coefficients) < 0  # as published
    assert rescale(torch.tensor(0.3), (1.0, 0.0)) == pytest.approx(0.3)
    assert joint_relative_l1([(a, b), (2 * a, 2 * b)]) == pytest.approx(relative_l1(a, b))
    assert joint_relative_l1([(a, b), (b, b)]) == pytest.approx(relative_l1(a, b) / 2)  # a chunk at rest dilutes
    assert table_entry((0.1, 0.2), 1, 2) == 0.2
    table = (0.0, 0.1, 0.3, 0.2, 0.4)
    longer = [table_entry(table, k, 5) for k in range(5)]
    assert longer == pytest.approx(table)
    assert [table_entry(table, k, 3) for k in range(3)] == pytest.approx([0.0, 0.4, 0.6])
    assert sum(table_entry(table, k, 9) for k in range(9)) == pytest.approx(1.0)
    assert log_snr(0.5) == 0
    assert log_snr(0.2) == pytest.approx(math.log(4))
    assert math.isfinite(log_snr(0.0)) and math.isfinite(log_snr(1.0))


class TestReuseBuffer:
    def test_hold(self):
        buffer = ReuseBuffer()
        first, second = torch.randn(2, 1, 4, 3).unbind(0)
        buffer.store(first.clone(), 0.0)
        buffer.store(second[:, [1, 3]], 1.0, torch.tensor([1, 3]))
        expected = first.clone()
        expected[:, [1, 3]] = second[:, [1, 3]]
        assert torch.equal(buffer.predict(7.0), expected)

    def test_first_order_is_exact_for_a_line_in_time_however_tokens_were_chosen(self):
        slope, offset = torch.randn(2, 1, 6, 3).unbind(0)
        line = lambda t: offset + slope * t  # noqa: E731
        buffer = ReuseBuffer(order=1)
        buffer.store(line(0.0), 0.0)
        assert torch.equal(buffer.predict(3.0), line(0.0))  # one measurement: held
        some = torch.tensor([0, 4])
        buffer.store(line(1.0)[:, some], 1.0, some)
        torch.testing.assert_close(buffer.predict(2.5)[:, some], line(2.5)[:, some])
        torch.testing.assert_close(buffer.predict(2.5)[:, 1], line(0.0)[:, 1])
        buffer.store(line(3.0), 3.0)
        buffer.store(line(4.0)[:, some], 4.0, some)
        torch.testing.assert_close(buffer.predict(6.0), line(6.0), atol=1e-4, rtol=1e-4)

    def test_a_weight_follows_the_line_part_of_the_way(self):
        buffer = ReuseBuffer(order=1, weight=0.75)
        for time in (0.0, 2.0):
            buffer.store(torch.full((1, 2, 3), time), time)
        torch.testing.assert_close(buffer.predict(6.0), torch.full((1, 2, 3), 5.0))

    def test_change_is_relative_l1_per_token(self):
        buffer = ReuseBuffer(measures_change=True)
        buffer.store(torch.ones(1, 3, 2), 0.0)
        assert buffer.change.eq(0).all()
        buffer.store(torch.full((1, 1, 2), 1.5), 1.0, torch.tensor([1]))
        torch.testing.assert_close(buffer.change, torch.tensor([0.0, 0.5, 0.0]))

    def test_a_selection_needs_a_whole_step_before(self):
        with pytest.raises(RuntimeError, match="must cover all"):
            ReuseBuffer().store(torch.zeros(1, 1, 2), 0.0, torch.tensor([0]))
        with pytest.raises(RuntimeError, match="nothing was computed"):
            ReuseBuffer().predict(0.0)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpah": 0.5}, "did you mean 'alpha'"),
            ({"alpha": 1.2}, "allowed: 0 to 1"),
            ({"threshold": -1}, "allowed: at least 0"),
            ({"threshold": math.nan}, "threshold: nan is not allowed; give a finite number"),
            ({"threshold": math.inf}, "threshold: inf is not allowed; give a finite number"),
            ({"polynomial": (1.0, math.inf)}, "a list, each of it a finite number"),
            ({"distance": "table", "distance_table": [0.1, math.nan]}, "a list, each of it a finite number"),
            ({"budget": 0}, "allowed: 0.01 to 1"),
            ({"grading": 1.0}, "allowed: 0 to 0.95"),
            ({"extrapolation_weight": 1.5}, "allowed: 0 to 1"),
            ({"grading": 0.5, "method": "teacache"}, "decides once for all chunks"),
            ({"warmup_steps": 0}, "allowed: at least 1"),
            ({"warmup_steps": 2.5}, "give a whole number"),
            ({"temporal_vote": 1}, "give true or false"),
            ({"score": "motion"}, "give 'output_motion' or"),
            ({"polynomial": "x"}, "a list, each of it a finite number"),
            ({"distance": "table"}, "needs distance_table"),
            ({"reuse": "velocity"}, "score 'latent_motion'"),
            ({"reuse": "update"}, "which reuse 'update' skips"),
            ({"kv_granularity": "row"}, "give 'token' or"),
        ],
        ids=str,
    )
    def test_bad_values_name_the_way_out(self, settings, message):
        with pytest.raises(UserError, match=message) as caught:
            MotionCacheConfig.from_dict(settings)
        assert "\n" not in str(caught.value)

    def test_presets(self):
        assert MotionCacheConfig.preset("slow").threshold == 0.1
        assert MotionCacheConfig.preset("fast").polynomial is None  # the model's adapter knows it
        assert not MotionCacheConfig.preset("flowcache-slow").token_level
        assert not MotionCacheConfig.preset("teacache-slow").token_level
        with pytest.raises(UserError, match="did you mean 'slow'"):
            MotionCacheConfig.preset("slo")

    def test_yaml_round_trip(self):
        config = MotionCacheConfig(distance="table", distance_table=(0.1, 0.2))
        assert MotionCacheConfig.from_dict(config.to_dict()) == config
        assert config.to_dict()["distance_table"] == [0.1, 0.2]


def test_trace_round_trip():
    trace = Trace()
    with trace.timed(torch.device("cpu")):
        trace.records.append(Record(0, 1, 2, "cond", 3, "denoise", "select", 10, 40, 80))
    assert trace.records[0].seconds > 0
    trace.note_memory({"kv": 3, "values": 5})
    trace.note_memory({"kv": 7, "values": 0})
    again = Trace.from_dict(trace.to_dict())
    assert again.records[0].tokens == 10
    assert again.totals() == {"tokens_computed": 10, "tokens_total": 40}
    assert again.peak_bytes == {"kv": 7, "values": 5, "total": 8}
