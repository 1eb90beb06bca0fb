"""The search for a threshold needs few points, on curves that are known."""

import math

import pytest

from benchmarks.search import NEVER, Curve, Point, Target, search
from common.errors import UserError

FLOOR = 0.15


def smooth(threshold):
    share = FLOOR if threshold == NEVER else FLOOR + (1 - FLOOR) * min(1.0, 0.02 / threshold)
    return Point(threshold, share, speedup=1 / (0.1 + 0.9 * share), psnr_db=10 + 30 * share)


def stairs(threshold):
    """A chunk that computes whole steps of thirty."""
    return Point(threshold, math.floor(30 * smooth(threshold).share) / 30)


@pytest.mark.parametrize("start", [1e-4, 0.03, 20.0])
@pytest.mark.parametrize("goal", ["share=0.6", "share=0.3", "share=0.16", "speedup=1.5", "speedup=3", "psnr=20"])
def test_search_needs_few_points(goal, start):
    curve, target = Curve(smooth), Target.parse(goal)
    point = search(curve, target, start)
    assert target.miss(point) <= 0.01
    assert len(curve.points) <= 8


def test_search_for_several_targets_shares_points():
    curve = Curve(smooth)
    for share in (0.6, 0.4, 0.3, 0.2):
        assert search(curve, Target("share", share), 0.05).share == pytest.approx(share, rel=0.01)
    assert len(curve.points) <= 13


@pytest.mark.parametrize("share", [0.6, 0.31, 0.2])
def test_search_on_stairs_takes_the_nearest_step(share):
    curve = Curve(stairs)
    point = search(curve, Target("share", share), 0.05)
    assert abs(point.share - share) <= 0.5 / 30 + 1e-9
    assert len(curve.points) <= 10


@pytest.mark.parametrize(
    ("goal", "allowed"),
    [("share=0.1", "share=0.15 to 1"), ("speedup=9", "speedup=1 to 4.25"), ("psnr=9", "psnr=14.5 or more")],
)
def test_unreachable_target_says_what_can_be_reached_after_one_point(goal, allowed):
    curve = Curve(smooth)
    with pytest.raises(UserError, match=f"{goal} cannot be reached.*{allowed}"):
        search(curve, Target.parse(goal), 0.05)
    assert len(curve.points) == 1


@pytest.mark.parametrize(
    "text", ["0.3", "share", "share=x", "share=1.5", "speedup=0.5", "psnr=0", "psnr=nan", "time=2"]
)
def test_target_that_is_none(text):
    with pytest.raises(UserError, match="give .*share=|give speedup=|give psnr="):
        Target.parse(text)
