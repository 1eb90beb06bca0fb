"""How often the host would wait for a GPU: at most once per iteration."""

from functools import cache

import pytest

from benchmarks import memory
from benchmarks.speed.counted import count_session
from benchmarks.speed.subject import Mode

EVERY = 8
MODES = ["exact", "budget 0.25", "best", "budget 0.25, state_device cpu"]
READ_ONCE = {"skyreels": 4, "magi": 8}  # a window's schedule and frame rate; captions of seven chunks and of none


@cache
def counted(model, name):
    subject, iterations = memory.load(model, "tiny", EVERY)
    modes = {mode.name: mode for mode in memory.modes(subject, memory.CONFIGS[model])}
    return count_session(subject, modes[name], iterations)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("model", READ_ONCE)
def test_at_most_one_wait_per_iteration(model, name):
    found = counted(model, name)
    later = found.iterations[1:]  # the first one reads the schedule
    assert max(i.waits + i.loop_waits for i in later) <= 1, (found.waits, found.loop_waits)
    assert sum(i.waits for i in found.iterations) <= READ_ONCE[model], found.waits
    assert not any(i.loop_waits for i in later), found.loop_waits


def test_the_librarys_own_solver_waits_for_every_frame():
    found = counted("skyreels", "stock")
    assert min(i.loop_waits for i in found.iterations) > 1
    assert any("scheduling_unipc" in place for place in found.loop_waits)


@pytest.mark.parametrize("model", READ_ONCE)
def test_a_table_decides_on_the_host(model):
    subject, iterations = memory.load(model, "tiny", EVERY)
    table = {"distance": "table", "distance_table": (0.0, 1.0), "threshold": 0.7, "warmup_steps": 1}
    whole = Mode("table", subject.cached.replace(budget=None, alpha=1.0, **table))
    found = count_session(subject, whole, iterations)
    assert sum(i.waits for i in found.iterations) <= READ_ONCE[model], found.waits


@pytest.mark.parametrize("model", READ_ONCE)
def test_thresholds_need_the_gpus_values(model):
    subject, iterations = memory.load(model, "tiny", EVERY)
    threshold = Mode("threshold", subject.cached.replace(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"common/cache/policy\.py:\d+ reads values"):
        count_session(subject, threshold, iterations)
