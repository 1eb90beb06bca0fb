"""The benchmark at full size, on the smallest size: the same path, but for the clock."""

import json

import pytest
import torch

from benchmarks import full_size
from benchmarks.speed.instruments import Clock, Counter, Regions
from benchmarks.speed.magi import Magi
from benchmarks.speed.measure import measure_steady, measure_whole
from benchmarks.speed.replay import Schedule
from benchmarks.speed.skyreels import SkyReels
from benchmarks.speed.subject import WARMUP_STEPS, WHOLE, Mode, paper_share, with_share
from common.cache import MotionCacheConfig, Record, Trace
from common.errors import UserError

CPU = torch.device("cpu")
EXACT = Mode("exact", MotionCacheConfig.preset("exact"))


@pytest.fixture(scope="module", params=[SkyReels, Magi])
def subject(request):
    return request.param("tiny", CPU)


def run(*arguments):
    return full_size.main(["--size", "tiny", "--device", "cpu", *map(str, arguments)])


def test_one_command_makes_the_table(tmp_path):
    output = tmp_path / "gpu" / "cpu.json"
    assert run("--iterations", 1, "--shares", 0.5, "--output", output) == 0
    data = json.loads(output.read_text())
    rows = {(row["model"], row["mode"]): row for row in data["rows"]}
    assert [mode for _, mode in rows] == [
        *("stock", "exact", "cached 0.5", "paper 30 of 113 PFLOP"),
        *("exact", "cached 0.5", "paper 64 of 139 PFLOP"),
    ]
    for (model, mode), row in rows.items():
        exact = rows[model, "exact"]
        assert row["time_ratio"] == pytest.approx(row["seconds"] / exact["seconds"], rel=1e-3)
        ceiling = data["ceiling"]["matmul_tflops"]
        assert row["fraction_of_ceiling"] == pytest.approx(row["tflops"] / ceiling, rel=1e-3)
        assert row["share"] == pytest.approx({"cached 0.5": 0.5}.get(mode, row["share"]), abs=0.01)
        assert row["host_reads"] == 0  # budget form and exact decide without asking the device
        assert row["syncs"] is row["launches"] is row["peak_gib"] is None  # there is no CUDA device to count them on
        assert {"self-attention", "feed-forward", "embedding", "head"} <= set(row["components"])
        assert ("policy" in row["components"]) == (mode != "stock")
    for (model, name), count in {("skyreels-v2-random", "stock"): 2, ("magi-1-random", "exact"): 1}.items():
        assert rows[model, name]["video_seconds_scaled_from"] == count
    page = output.with_suffix(".md").read_text()
    assert page.count("\n| skyreels-v2-random |") == 4 and page.count("\n| magi-1-random |") == 3
    assert page.count("≈") == len(rows) + 1


def test_compiled_blocks(tmp_path):
    output = tmp_path / "compiled.json"
    assert run("--models", "magi", "--iterations", 1, "--shares", "--compile", "eager", "--output", output) == 0
    data = json.loads(output.read_text())
    compiled = data["compiled"]["magi-1-random"]
    assert compiled["graph_breaks"] == 0 and 0 < compiled["graphs"] <= compiled["graph_limit"]
    for row in data["rows"]:
        assert "blocks, compiled" in row["components"] and "feed-forward" not in row["components"]


def test_a_measured_model_is_left_as_it_was(subject):
    before = [set(vars(module)) for module in subject.transformer.modules()]
    measure_steady(subject, EXACT, Clock(CPU), 1, compiled=False)
    assert [set(vars(module)) for module in subject.transformer.modules()] == before


def test_host_reads_are_counted(subject):
    threshold = Mode("threshold", subject.cached.replace(threshold=0.0))
    steady = measure_steady(subject, threshold, Clock(CPU), 1, compiled=False)
    chunks = {(r.chunk, r.branch) for r in subject.plan() if r.role == "denoise"}
    assert 4 <= steady.counts["host_reads"] <= len(chunks)  # one per chunk and branch that is being denoised


def test_only_reads_inside_the_model_and_the_iteration_count():
    class Model:
        def forward(self):
            return torch.ones(3).sum().item(), torch.ones(3).nonzero()

    model, counter = Model(), Counter(CPU)
    with counter.installed(model, "forward"):
        model.forward()
        counter.start()
        model.forward()
        torch.ones(3).sum().item()
        model.forward()
        counter.stop()
        model.forward()
    assert counter.counts().host_reads == 4


def test_whole_videos_compute_what_was_planned(subject):
    exact = measure_whole(subject, EXACT, Clock(CPU))
    assert exact["share"] == 1
    assert exact["flops"] == pytest.approx(subject.flops(subject.plan()))
    share = paper_share(subject)
    config = subject.cached.replace(budget=share, warmup_steps=WARMUP_STEPS)
    paper = measure_whole(subject, Mode("paper", config, share), Clock(CPU))
    assert paper["flops"] == pytest.approx(subject.flops(with_share(subject.plan(), share)))
    cached, vanilla = subject.paper
    tokens = next(r.tokens_total for r in subject.plan())
    in_stock = subject.stock_flops() * subject.video_iterations
    assert paper["flops"] / in_stock == pytest.approx(cached / vanilla, abs=1 / tokens)


@pytest.mark.parametrize(("model", "petaflops"), [(SkyReels, 58.8), (Magi, 140.5)])
def test_plans_at_full_size(model, petaflops):
    subject = model("full", torch.device("meta"))
    assert subject.stock_flops() * subject.video_iterations / 1e15 == pytest.approx(petaflops, abs=0.1)
    span = subject.steady(12)
    steady = [r for r in subject.plan() if span.start < r.iteration < span.stop]
    per_iteration = {i: {r.chunk for r in steady if r.iteration == i} for i in range(span.start + 1, span.stop)}
    assert {len(chunks) for chunks in per_iteration.values()} == {5 if model is SkyReels else 4}
    assert {r.role for r in steady} == {"denoise"}


def test_more_iterations_than_are_steady(subject):
    with pytest.raises(UserError, match="lower --iterations"):
        subject.steady(100)


def test_a_recorded_schedule_is_followed(subject):
    branches = {record.branch for record in subject.plan()}
    pattern = [1.0, 0.0, 0.5, 0.25]
    steps = max(r.step for r in subject.plan() if r.role == "denoise") + 1
    records = [
        Record(0, k, 0, branch, k, "denoise", "select", round(8 * pattern[k % 4]), 8, 8)
        for branch in branches
        for k in range(steps)
    ]
    schedule = Schedule.of(Trace(records=records))
    with subject.session(Mode("replay", subject.cached, schedule=schedule), WHOLE) as session:
        session.denoise(lambda: None)
    done = [r for r in session.records if r.role == "denoise"]
    first = {(r.chunk, r.branch): r.step for r in reversed(done)}
    for record in done:
        wanted = 1.0 if record.step == first[record.chunk, record.branch] else pattern[record.step % 4]
        assert record.tokens == round(wanted * record.tokens_total), record


def test_schedules_that_do_not_fit(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"trace\.json"):
        Schedule.read(path)
    subject = Magi("tiny", CPU)
    schedule = Schedule({("cond", 0): [1.0, 0.5]})
    with (
        pytest.raises(UserError, match="no branch 'text', only cond"),
        subject.session(Mode("replay", subject.cached, schedule=schedule), subject.steady(2)) as session,
    ):
        session.denoise(lambda: None)


def test_time_of_a_part_leaves_out_the_parts_inside():
    class Ticks(Clock):
        now = 0.0

        def mark(self):
            return self.now

        def work(self, seconds):
            type(self).now += seconds

    class Model:
        def inner(self):
            clock.work(2)

        def outer(self):
            clock.work(1)
            self.inner()

    clock = Ticks(CPU)
    regions, model = Regions(clock), Model()
    with regions.installed([(model, "outer", "outer"), (Model, "inner", "inner")]):
        model.outer()  # not running yet
        regions.start()
        model.outer()
        model.inner()
        clock.work(4)
        regions.stop()
    assert regions.seconds() == {"iteration": 4, "inner": 4, "outer": 1}
    assert "outer" not in vars(model)
