"""Parts of the benchmark at full size: what it measures of a model, and with what."""

from contextlib import contextmanager

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from benchmarks.speed import bench as bench_module
from benchmarks.speed import kernels
from benchmarks.speed.arithmetic import iteration_cost
from benchmarks.speed.bench import Bench
from benchmarks.speed.compiling import CompiledBlocks
from benchmarks.speed.failures import first_line
from benchmarks.speed.instruments import Clock, Regions
from benchmarks.speed.kernels import DEFAULT, MASKED, attention_rates, fastest
from benchmarks.speed.magi import Magi
from benchmarks.speed.measure import Steady, measure_steady, measure_whole
from benchmarks.speed.profiling import Profiler, gpu_work, host_counts
from benchmarks.speed.replay import Schedule
from benchmarks.speed.rows import CARD_GIB, Row
from benchmarks.speed.skyreels import SkyReels
from benchmarks.speed.subject import WARMUP_STEPS, WHOLE, Mode, paper_share, with_share
from common.cache import MotionCacheConfig, Record, Trace
from common.errors import UserError

CPU = torch.device("cpu")
EXACT = Mode("exact", MotionCacheConfig.preset("exact"))


@pytest.fixture(scope="module", params=[SkyReels, Magi])
def subject(request):
    return request.param("tiny", CPU)


def test_what_is_told_of_an_error():
    assert first_line(ValueError("\n  one\ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"
    raised = RuntimeError("backend='inductor' raised:\nImportError: no compiler\nmore")
    assert first_line(raised) == "RuntimeError: backend='inductor' raised: ImportError: no compiler"


def rates(**speeds):
    """Of whole chunks and of a quarter, per kernel; None refuses."""
    found = []
    for kernel, pair in speeds.items():
        for queries, speed in zip((400, 100), pair, strict=True):
            told = {"error": "no"} if speed is None else {"tflops": speed}
            found.append({"kernel": kernel, "layout": "by head", "queries": queries, "keys": 800, **told})
        found.append({"kernel": kernel, "layout": "by row", "queries": 400, "keys": 800, "tflops": 999.0})
        found.append({"kernel": kernel, "layout": "by head", "queries": 100, "keys": 102, "tflops": 999.0})
    return found


def test_a_clearly_faster_kernel_is_taken():
    assert fastest(rates(default=(400, 300), _native_cudnn=(500, 320))) == "_native_cudnn"
    assert fastest(rates(default=(400, 300), _native_cudnn=(415, 310))) == DEFAULT  # within noise
    assert fastest(rates(default=(400, 300), _native_cudnn=(600, 100))) == DEFAULT  # loses at a quarter
    assert fastest(rates(default=(400, 300), _native_cudnn=(900, None), _native_flash=(500, 400))) == "_native_flash"
    assert fastest(rates(default=(None, None), _native_cudnn=(500, 500))) == DEFAULT


def test_flash_attn_leaves_no_choice(monkeypatch):
    monkeypatch.setattr("benchmarks.speed.kernels.is_flash_attn_available", lambda: True)
    assert fastest(rates(default=(400, 300), _native_cudnn=(500, 320))) == DEFAULT


def test_a_kernel_that_refuses_is_told(monkeypatch):
    assert {rate["kernel"] for rate in attention_rates(Clock(CPU), (16, 32, 2, 16))} == {DEFAULT}
    monkeypatch.setattr(kernels, "available", lambda device: (DEFAULT, "_native_flash", "_native_cudnn"))
    shown = attention_rates(Clock(CPU), (16, 32, 2, 16))
    sizes = [(16, 32), (4, 32), (4, kernels.PROMPT_KEYS)]
    for name in (DEFAULT, "_native_flash", "_native_cudnn"):
        ours = [rate for rate in shown if rate["kernel"] == name]
        assert [(rate["queries"], rate["keys"]) for rate in ours] == sizes * 2
        assert all(("error" in rate) == (name == "_native_cudnn") != ("tflops" in rate) for rate in ours)
    assert fastest(shown) != "_native_cudnn"


def steady(seconds=1.0):
    counts = {"host_reads": 0, "syncs": None, "loop_syncs": None, "launches": None}
    return Steady(seconds, 1e9, 1.0, None, 0.1, {}, counts, None)


def test_our_rows_run_with_the_chosen_kernel(monkeypatch):
    seen = {}

    def measure(subject, mode, clock, iterations, compiled):
        seen[mode.name] = _AttentionBackendRegistry.get_active_backend()[0]
        return steady()

    monkeypatch.setattr(bench_module, "measure_steady", measure)
    monkeypatch.setattr(bench_module, "fastest", lambda rates: "_native_flash")
    bench = Bench(SkyReels("tiny", CPU), Clock(CPU), 1e12, None)
    assert bench.look()["attention"] == "_native_flash"
    told = {mode.name: bench.measure(Row(mode, 1))["attention"] for mode in (EXACT, Mode("stock", None))}
    assert told == {"exact": "_native_flash", "stock": MASKED}
    assert seen == {"exact": AttentionBackendName._NATIVE_FLASH, "stock": AttentionBackendName.NATIVE}


def test_compiled_blocks_take_the_chosen_kernel(subject, monkeypatch):
    monkeypatch.setattr(bench_module, "fastest", lambda rates: "_native_flash")
    torch._dynamo.reset()
    bench = Bench(subject, Clock(CPU), 1e12, "eager")
    bench.look()
    mode = Mode("cached 0.5", subject.cached.replace(budget=0.5))
    row = bench.measure(Row(mode, 1, compiled=True))
    torch._dynamo.reset()
    assert row["attention"] == "_native_flash" and row["graphs"] > 0 and row["graph_breaks"] == 0
    assert all(module._compiled_call_impl is None for module in subject.transformer.modules())


def test_more_shapes_than_the_limit_are_all_compiled():
    class Block(nn.Module):
        def forward(self, x):
            return 2 * x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def compile_repeated_blocks(self, backend):
            self.block.compile(backend=backend, dynamic=False)  # so that each length is a graph

    torch._dynamo.reset()
    model, limit = Model(), torch._dynamo.config.recompile_limit
    with CompiledBlocks(model, "eager").on() as found:
        for length in range(limit + 2):
            model.block(torch.zeros(3 + length, 2))
    torch._dynamo.reset()
    assert found == {"graphs": limit + 2, "graph_breaks": 0, "graph_limit": limit}
    assert torch._dynamo.config.recompile_limit == limit and model.block._compiled_call_impl is None


@pytest.mark.parametrize("fits", [True, False])
def test_rows_for_a_small_card(fits, monkeypatch):
    class Capped(Clock):
        @contextmanager
        def memory_cap(self, gib):
            caps.append(gib)
            yield True
            caps.pop()

    def measure(subject, mode, clock, iterations, compiled):
        if caps and not fits:
            caps.clear()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        measured.append(mode.config.state_device)
        return steady()

    caps, measured = [], []
    monkeypatch.setattr(bench_module, "measure_steady", measure)
    bench = Bench(Magi("tiny", CPU), Capped(CPU), 1e12, None)
    offloaded = Mode("exact, K/V in main memory", MotionCacheConfig(method="exact", state_device="cpu"))
    row = bench.measure(Row(offloaded, 1, cap_gib=CARD_GIB))
    assert row["fits"] is fits and row["cap_gib"] == 24 and row["seconds"] == 1.0
    assert measured == ["cpu"] and caps == []
    assert row["time_ratio"] is row["video_seconds"] is None  # exact was not measured


@pytest.mark.parametrize(("name", "index"), [("cuda", None), ("cuda:1", 1)])
def test_memory_is_capped_by_its_share_of_the_device(name, index, monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 80 * 2**30})())
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    with pytest.raises(ZeroDivisionError), Clock(torch.device(name)).memory_cap(24.0) as capped:
        assert capped and fractions == [(0.3, index)]
        raise ZeroDivisionError
    assert fractions == [(0.3, index), (1.0, index)]


def event(cat, name, start, duration):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration}


def test_kernels_and_copies_fill_the_gpu():
    assert gpu_work([event("cpu_op", "aten::mm", 0, 100)]) is None
    found = gpu_work(
        [
            event("cpu_op", "aten::mm", 0, 1000),
            event("kernel", "gemm", 500, 200),
            event("gpu_memcpy", "Memcpy HtoD", 600, 50),  # beside the first
            event("gpu_memset", "Memset", 650, 100),  # longer than it
            event("kernel", "gemm", 1000, 300),
            *(event("kernel", f"small {i}", 2000 + i, 1) for i in range(20)),
        ]
    )
    assert found.busy_seconds == pytest.approx((250 + 300 + 20) / 1e6)
    assert found.kernels[0] == ("gemm", 2, pytest.approx(500e-6))
    assert [name for name, *_ in found.kernels[1:3]] == ["Memset", "Memcpy HtoD"] and len(found.kernels) == 15


def test_the_profiler_is_free_after_an_error():
    class Model:
        def forward(self):
            raise ValueError("in the middle")

    model = Model()
    for _ in range(2):  # the second would find it running
        profiler = Profiler(CPU)
        with pytest.raises(ValueError, match="in the middle"), profiler.installed(model, "forward"):
            profiler.start()
            model.forward()


@pytest.mark.parametrize(
    ("model", "exact", "paper"), [(SkyReels, (0.575, 0.265), (0.165, 0.076)), (Magi, (0.925, 0.497), (0.374, 0.201))]
)
def test_flops_of_an_iteration(model, exact, paper):
    """The figures of docs/speed.md."""
    subject = model("full", torch.device("meta"))
    for share, (attention, products) in ((1.0, exact), (paper_share(subject), paper)):
        cost = iteration_cost(subject, share)
        assert cost.attention / 1e15 == pytest.approx(attention, abs=5e-4)
        assert cost.products / 1e15 == pytest.approx(products, abs=5e-4)
        assert cost.seconds(2e15, 1e15) == pytest.approx((cost.attention / 2 + cost.products) / 1e15)


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

    model, counter = Model(), Profiler(CPU)
    with counter.installed(model, "forward"):
        model.forward()
        counter.start()
        model.forward()
        torch.ones(3).sum().item()
        model.forward()
        counter.stop()
        model.forward()
    assert host_counts(counter.events(), cuda=False).host_reads == 4


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
