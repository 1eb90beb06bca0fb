"""The benchmark at full size, on the smallest size: the same path, but for the clock."""

import copy
import json

import pytest
import torch

from benchmarks import full_size
from benchmarks.speed import checks as checks_module
from benchmarks.speed.bench import Bench
from benchmarks.speed.checks import Check
from benchmarks.speed.kernels import DEFAULT, MASKED
from benchmarks.speed.page import markdown
from benchmarks.speed.skyreels import SkyReels

SMALL = ["exact, K/V in main memory", "cached 0.25, K/V in main memory"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What one call leaves for both models: JSON and page."""
    output = tmp_path_factory.mktemp("gpu") / "gpu" / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks_module, "WHOLE", slice(0, 6))
        assert run("--iterations", 1, "--shares", 0.5, "--only-eager", "--output", output) == 0
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


@pytest.fixture
def quick(monkeypatch):
    """The command without its measurements: what each row's is to be is told by the row's name."""
    outcomes = {}

    def measure(bench, row):
        outcome = outcomes.get(row.name)
        if isinstance(outcome, BaseException):
            raise outcome
        seconds = {"model": bench.subject.name, "mode": row.name, "seconds": 1.0, "video_seconds": 9.0}
        return {**seconds, "video_seconds_scaled_from": row.iterations}

    monkeypatch.setattr(full_size, "checks", lambda *_: iter(()))
    monkeypatch.setattr(full_size, "compiled_checks", lambda *_: iter(()))
    monkeypatch.setattr(Bench, "measure", measure)
    return outcomes


def run(*arguments):
    return full_size.main(["--size", "tiny", "--device", "cpu", *map(str, arguments)])


def modes(data, model):
    return [row["mode"] for row in data["rows"] if row["model"] == model]


def packed(mode):
    return f"{mode}, K/V in 8 bits"


def test_one_call_gives_every_row(result):
    data, page = result
    paper = "paper 30 of 113 PFLOP"
    assert modes(data, "skyreels-v2-random") == ["exact", paper, "stock", *SMALL, packed(paper), "cached 0.5"]
    paper = "paper 64 of 139 PFLOP"
    assert modes(data, "magi-1-random") == ["exact", paper, *SMALL, packed(paper), "cached 0.5"]
    assert data["failed"] == data["missing"] == []
    assert page.count("≈") == len(data["rows"]) + 1
    rows = {(row["model"], row["mode"]): row for row in data["rows"]}
    for (model, mode), row in rows.items():
        assert row["time_ratio"] == pytest.approx(row["seconds"] / rows[model, "exact"]["seconds"], rel=1e-3)
        ceiling = data["ceiling"]["matmul_tflops"]
        assert row["fraction_of_ceiling"] == pytest.approx(row["tflops"] / ceiling, rel=1e-3)
        if mode == "cached 0.5":
            assert row["share"] == pytest.approx(0.5, abs=0.01)
        assert row["host_reads"] == 0  # budget form and exact decide without asking the device
        # There is no CUDA device to count these on.
        assert row["syncs"] is row["launches"] is row["peak_gib"] is row["gpu_busy"] is None and row["kernels"] == []
        assert row["attention"] == (MASKED if mode == "stock" else DEFAULT) and row.get("fits") is None
        assert {"embedding", "head"} <= set(row["components"]) and row["warmup_seconds"] > 0
        assert ("policy" in row["components"]) == (mode != "stock")


def test_speedups_are_over_stock(result):
    data, _ = result
    stock = next(row for row in data["rows"] if row["mode"] == "stock")
    assert stock["times_stock"] == 1 and stock["video_seconds_scaled_from"] == 2
    for row in data["rows"]:
        if row["model"] != stock["model"]:
            assert row["times_stock"] is None  # no library has MAGI-1
        else:
            assert row["times_stock"] == pytest.approx(stock["video_seconds"] / row["video_seconds"], rel=1e-3)


def test_compiled_rows_and_eager_ones_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(checks_module, "WHOLE", slice(0, 6))
    output, options = tmp_path / "compiled.json", ("--no-stock", "--compile-backend", "eager")
    assert run("--models", "skyreels", "--iterations", 1, "--shares", *options, "--output", output) == 0
    data, paper = json.loads(output.read_text()), "paper 30 of 113 PFLOP"
    assert data["checks"][-1]["check"] == "exact compiled against eager, bfloat16"
    rows = {row["mode"]: row for row in data["rows"]}
    assert list(rows) == ["exact", paper, "exact, compiled", f"{paper}, compiled", *SMALL, packed(paper)]
    for mode, row in rows.items():
        compiled = mode.endswith("compiled")
        assert ("blocks, compiled" in row["components"]) == compiled == ("graphs" in row)
        assert ("feed-forward" in row["components"]) != compiled
        exact = rows["exact, compiled" if compiled else "exact"]
        assert row["time_ratio"] == pytest.approx(row["seconds"] / exact["seconds"], rel=1e-3)
    counted = [row for row in rows.values() if "graphs" in row]
    assert all(row["graph_breaks"] == 0 for row in counted)
    assert 0 < sum(row["graphs"] for row in counted) <= counted[0]["graph_limit"] == 8


def test_the_device_is_checked_first(result):
    data, page = result
    assert [(check["model"], check["check"]) for check in data["checks"]] == [
        ("skyreels-v2-random", "exact against stock, float32"),
        ("skyreels-v2-random", "cached against the CPU, float32"),
        ("magi-1-random", "exact against the CPU, float32"),
        ("magi-1-random", "cached against the CPU, float32"),
    ]
    assert all(check["passed"] and check["difference"] <= check["tolerance"] for check in data["checks"])
    assert data["checks"][0]["difference"] > 0  # two ways to sum
    assert page.index("allowed") < page.index("Ceiling")


def test_attention_is_measured_at_the_models_shapes(result):
    data, page = result
    for name, model in data["models"].items():
        rates = model["attention_rates"]
        assert {rate["layout"] for rate in rates} == {"by head", "by row"}
        longest = max(rate["keys"] for rate in rates)
        whole, quarter = sorted({r["queries"] for r in rates if r["keys"] == longest}, reverse=True)
        assert quarter == whole // 4 and all(rate["tflops"] > 0 for rate in rates)
        assert model["exact_iteration"]["seconds_at_ceilings"] > 0
        assert page.count(f"| {name} | default | by head") == 3


def test_a_check_that_is_off_makes_the_exit_code(quick, tmp_path, monkeypatch):
    def found(*_):
        yield Check("model", "near", 0.1, lambda: (torch.tensor([1.0, 10.5]), torch.tensor([1.0, 10.0])))
        yield Check("model", "far", 0.1, lambda: (torch.tensor([2.5, 10.0]), torch.tensor([1.0, 10.0])))
        yield Check("model", "broken", 0.1, lambda: (torch.tensor([torch.nan]), torch.tensor([1.0])))

    monkeypatch.setattr(full_size, "checks", found)
    output = tmp_path / "off.json"
    assert run("--models", "magi", "--shares", "--output", output) == 1
    data = json.loads(output.read_text())
    assert [check["passed"] for check in data["checks"]] == [True, False, False]
    assert [check["difference"] for check in data["checks"]] == [pytest.approx(0.05), pytest.approx(0.15), 1e300]
    assert len(data["rows"]) == 7  # and the run goes on
    assert "| model | far | 0.15 | 0.1 | **no** |" in output.with_suffix(".md").read_text()


def test_a_failing_row_is_told_and_the_others_go_on(quick, tmp_path):
    quick["exact, compiled"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore | advice")
    quick["stock"] = RuntimeError("")
    output = tmp_path / "failing.json"
    assert run("--shares", "--output", output) == 1
    data, page = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    memory = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert data["failed"] == [
        {"model": "skyreels-v2-random", "what": "stock", "error": "RuntimeError"},
        {"model": "skyreels-v2-random", "what": "exact, compiled", "error": memory},
        {"model": "magi-1-random", "what": "exact, compiled", "error": memory},
    ]
    assert f"- **failed**: magi-1-random exact, compiled: `{memory}`" in page
    assert len(data["rows"]) == 15 - len(data["failed"])


def test_a_model_that_cannot_be_made_leaves_the_other(quick, tmp_path, monkeypatch):
    def broken(size, device):
        if device.type == "meta":
            return SkyReels(size, device)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(full_size.SUBJECTS, "skyreels", broken)
    output = tmp_path / "broken.json"
    assert run("--shares", "--only-eager", "--output", output) == 1
    data = json.loads(output.read_text())
    assert [failure["what"] for failure in data["failed"]] == ["model with random weights"]
    paper = "paper 64 of 139 PFLOP"
    assert modes(data, "magi-1-random") == ["exact", paper, *SMALL, packed(paper)]


def test_no_row_begins_after_the_time_limit(quick, tmp_path):
    output = tmp_path / "late.json"
    times = iter(range(0, 1000, 10))
    arguments = ["--size", "tiny", "--device", "cpu", "--shares", "0.5", "--time-limit", "45", "--output", str(output)]
    assert full_size.run(full_size._parser().parse_args(arguments), "command", now=lambda: next(times))
    data, page = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    # The first row is asked for at 10 s. What tells most comes first, of both models.
    begun = [(row["model"].partition("-")[0], row["mode"]) for row in data["rows"]]
    assert begun == [("skyreels", m) for m in ("exact", "paper 30 of 113 PFLOP", "stock")] + [("magi", "exact")]
    missing = [(row["model"].partition("-")[0], row["mode"]) for row in data["missing"]]
    assert missing[:3] == [
        ("magi", "paper 64 of 139 PFLOP"),
        ("skyreels", "exact, compiled"),
        ("skyreels", "paper 30 of 113 PFLOP, compiled"),
    ]
    assert len(begun) + len(missing) == 19 and page.count("- not begun within 45 s: ") == len(missing)


def test_an_interrupted_run_says_what_it_has(quick, tmp_path, capsys):
    quick["stock"] = KeyboardInterrupt()
    output = tmp_path / "cut.json"
    assert run("--output", output) == 130
    assert f"interrupted: {output} has 2 rows" in capsys.readouterr().err
    assert len(json.loads(output.read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--iterations", 100), "lower --iterations"),
        (("--time-limit", -1), "--time-limit: -1.0 is outside its range"),
        (("--compile-backend", "triton"), "invalid choice: 'triton'"),
    ],
)
def test_bad_options_are_refused_first(arguments, message, tmp_path, capsys):
    assert run(*arguments, "--output", tmp_path / "never.json") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_page_shows_where_time_goes(result):
    data, page = copy.deepcopy(result)
    assert "kernels with the most time" not in page
    kernel = ["void gemm<a|b>" + "y" * 200, 30, 0.25]
    for row in data["rows"]:
        row.update({"kernels": [kernel], "gpu_busy": 0.9, "seconds": 0.5})
    page = markdown(data)
    assert page.count("the kernels with the most time in one iteration; GPU busy 90% of it.") == 8
    assert "| `void gemm<a\\|by" not in page and "| `void gemm<a\\|b>yyy" in page and "| 30 | 0.25 | 50.0% |" in page
