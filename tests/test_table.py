"""From folders of samples to tables: means, intervals, differences, and what is said of unfinished ones."""

import csv
import json
import subprocess

import pytest
from comparison_samples import trace_of, write, write_samples

from benchmarks import experiment, names, paper_flops, table
from benchmarks.collect import collect
from benchmarks.paper_scale import StepShares, magi_scale, skyreels_scale
from benchmarks.quoted import load_quoted
from benchmarks.render import cell, commits, notes
from benchmarks.subject import FAMILIES
from common.cache import Trace
from common.errors import UserError
from common.runs import REPOSITORY
from common.settings import CONFIGS

METHODS = {
    "stock": (1.4, 60.0),
    "exact": (1.0, 0.0),
    "exact-bfloat16": (1.0, 50.0),
    "flowcache-slow": (0.5, 34.0),
    "motioncache-slow": (0.45, 31.0),
    "flowcache-matched@0.4": (0.41, 30.0),
    "motioncache-matched@0.4": (0.39, 28.5),
    "motioncache-matched@0.2": (0.2, 20.0),
    "best-matched@0.2": (0.2, 33.0),
}


@pytest.fixture
def samples(tmp_path):
    return write_samples(tmp_path / "out", METHODS)


def rows_by_method(root, **options):
    return {row["method"]: row for row in table.rows_of(collect(root, **options))}


def test_rows(samples):
    rows = rows_by_method(samples)
    assert list(rows) == list(METHODS), "in reading order"
    flowcache = rows["flowcache-matched@0.4"]
    assert flowcache["compute_share"] == flowcache["token_share"] == 0.41
    assert flowcache["pflops"] == pytest.approx(0.41 * 2e-3)
    assert (flowcache["psnr_db"], flowcache["n"], flowcache["kv_bytes"]) == (31.0, 3, 4096)
    assert (flowcache["psnr_by_prompt"], rows["exact"]["psnr_by_prompt"]) == ([30.0, 31.0, 32.0], None)
    # Three prompts one dB apart: Student's t of two degrees of freedom, 4.303, over √3.
    assert flowcache["psnr_ci95"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert flowcache["speedup_vs_exact"] == pytest.approx(1 / 0.41, rel=1e-4)
    assert flowcache["speedup_vs_stock"] == pytest.approx(1.4 / 0.41, rel=1e-4)
    assert flowcache["latency_s"] == pytest.approx(8.2)
    assert (flowcache["preset"], rows["flowcache-slow"]["preset"], rows["exact"]["preset"]) == (None, "slow", "exact")
    assert rows["exact"]["psnr_db"] is None and rows["exact"]["speedup_vs_exact"] == 1
    assert rows["stock"]["kv_bytes"] is None


def test_a_model_is_named_with_the_settings_that_its_experiment_changed(samples):
    record = json.loads((samples / "experiment.json").read_text())
    write(samples / "experiment.json", record | {"settings": {"steps": 50, "ar_step": 0}})
    assert rows_by_method(samples)["exact"]["model"] == "skyreels-v2-tiny, steps 50, ar_step 0"


def test_difference_from_flowcache_is_paired_and_at_one_share(samples):
    rows = rows_by_method(samples)
    assert rows["motioncache-matched@0.4"]["minus_flowcache"] == [-1.5, 0.0]
    assert rows["motioncache-matched@0.2"]["minus_flowcache"] is None, "there is no FlowCache at that share"
    assert rows["motioncache-slow"]["minus_flowcache"] is None, "presets compute different shares"


def test_settings_are_those_in_which_methods_differ(tmp_path):
    cache = {f"motioncache-alpha{a:g}@0.4": {"alpha": a, "threshold": a / 10} for a in (0.5, 0.2)}
    root = write_samples(tmp_path, {"exact": (1, 0), **dict.fromkeys(cache, (0.4, 30))}, **cache)
    rows = rows_by_method(root)
    assert rows["motioncache-alpha0.2@0.4"]["settings"] == {"threshold": 0.02, "alpha": 0.2, "distance": "table"}


def test_settings_come_with_their_unit(tmp_path):
    cache = {f"motioncache-k{k}@0.4": {"chunk_phase": k} for k in (2, 6)}
    rows = rows_by_method(write_samples(tmp_path, {"exact": (1, 0), **dict.fromkeys(cache, (0.4, 30))}, **cache))
    assert rows["motioncache-k6@0.4"]["settings"] == {
        "chunk_phase": 6,
        "chunk_phase_unit": "updates",
        "distance": "table",
    }


def test_one_prompt_has_no_interval(tmp_path):
    rows = rows_by_method(write_samples(tmp_path, METHODS, prompts=1))
    assert rows["motioncache-matched@0.4"]["psnr_ci95"] is None
    assert rows["motioncache-matched@0.4"]["minus_flowcache"] == [-1.5, None]


def test_reading_order_counts_numbers():
    methods = ["motioncache-k10@0.4", "motioncache-k2@0.4", "exact", "motioncache-slow", "teacache-fast", "stock"]
    expected = ["stock", "exact", "teacache-fast", "motioncache-slow", "motioncache-k2@0.4", "motioncache-k10@0.4"]
    assert sorted(methods, key=names.reading_order) == expected


def test_an_unfinished_folder_is_refused_and_says_how_to_go_on(samples):
    for name in ("0001-prompt.json", "0001-prompt.scores.json"):
        (samples / "flowcache-slow" / name).unlink()
    with pytest.raises(
        UserError, match=r"1 of 27 samples .* 'flowcache-slow/0001-prompt'; go on with: python -m bench"
    ):
        collect(samples)
    assert rows_by_method(samples, partial=True)["stock"]["n"] == 2


def test_scores_of_other_videos_are_refused(samples):
    path = samples / "flowcache-slow" / "0002-prompt.scores.json"
    write(path, json.loads(path.read_text()) | {"reference": "an older exact"})
    with pytest.raises(UserError, match=r"1 videos .* 'flowcache-slow/0002-prompt'; score them with: python -m"):
        collect(samples)


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        collect(tmp_path)


def test_three_files(samples, tmp_path):
    write(samples / "vbench.json", {"motioncache-slow": {"color": 80.0, "total": 82.5}})
    table.make_table([samples], tmp_path / "results/t.json", "python -m benchmarks.table out")
    data = json.loads((tmp_path / "results/t.json").read_text())
    assert {"date", "versions", "commit", "command", "device", "threads", "rows", "quoted"} <= set(data)
    assert (data["device"], data["threads"], data["commit"]) == ("cpu", 1, "abc")
    page = (tmp_path / "results/t.md").read_text()
    assert "| motioncache-slow | 0.450 | 0.450 | 900.0 G | 3.11× | 2.22× | 9 s | 4.1 kB | 32.00 ± 2.48 |" in page
    assert (
        "| *quoted:* motioncache-slow (MotionCache) | – | – | 30.0 P | 6.28× | – | 245 s | – | 23.46 | 0.9093 |" in page
    )
    with (tmp_path / "results/t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data["rows"]) + len(data["quoted"])
    ours = next(line for line in lines if line["method"] == "motioncache-slow" and line["source"] == "measured")
    assert (float(ours["psnr_db"]), float(ours["vbench"])) == (32.0, 82.5)


def test_output_must_be_json(samples, tmp_path):
    with pytest.raises(UserError, match=r"ends in \.json"):
        table.make_table([samples], tmp_path / "t.md", "command")


def test_quoted_tables_have_every_model():
    for family in FAMILIES:
        papers = [quoted.paper for quoted in load_quoted(family)]
        assert papers == ["MotionCache, arXiv 2605.01725", "FlowCache, arXiv 2602.10825"]


def test_vanilla_and_exact_at_the_papers_sizes():
    skyreels = skyreels_scale()
    assert skyreels.vanilla / 1e15 == pytest.approx(113.4, abs=0.1)
    assert skyreels.exact / 1e15 == pytest.approx(80.6, abs=0.1)
    assert magi_scale(168, (5, 4, 3, 2)).vanilla / 1e15 == pytest.approx(139.19, abs=0.01)
    assert magi_scale(240, ()).vanilla / 1e15 == pytest.approx(305.98, abs=0.01)


@pytest.mark.parametrize("scale", [skyreels_scale, lambda: magi_scale(168, (5, 4, 3, 2))], ids=["skyreels", "magi"])
def test_schedules_replayed_at_the_papers_sizes(scale):
    scale = scale()
    assert scale.replayed(StepShares.of([trace_of(1.0)])) == pytest.approx(scale.exact)
    assert scale.replayed(StepShares.of([trace_of(0.0)])) == pytest.approx(scale.floor)
    half = scale.replayed(StepShares.of([trace_of(0.3), trace_of(0.7)]))
    assert scale.implied_share(half) == pytest.approx(0.5)


def test_shares_are_matched_by_position():
    shares = StepShares([[1.0] * 3 + [0.0] * 27, [0.5] * 30])
    computed = [shares.at(0, step, 50) for step in range(50)]
    assert sum(computed) == 5, "three of thirty warm-up steps are the papers' five of fifty"
    assert shares.at(4, 49, 50) == 0.5, "chunks beyond the last are like it"


def test_whole_iterations_of_a_joint_method():
    computed, skipped = trace_of(1.0, steps=2), trace_of(0.0, steps=6)
    for record in skipped.records:
        record.iteration += 2
    both = Trace(records=[*computed.records, *skipped.records])
    assert paper_flops.whole_iterations([both]) == 0.25


def test_paper_flops_of_samples(samples, tmp_path):
    output = tmp_path / "flops.json"
    assert paper_flops.main([str(samples), "--output", str(output)]) == 0
    rows = {(row["paper"], row["method"]): row for row in json.loads(output.read_text())["rows"]}
    assert set(rows) == {
        ("MotionCache", "flowcache-slow"),
        ("MotionCache", "motioncache-slow"),
        ("FlowCache", "flowcache-slow"),
    }
    row = rows["MotionCache", "motioncache-slow"]
    assert row["recorded_share"] == pytest.approx(0.45, abs=1e-3)
    assert (row["quoted_pflops"], row["dense_pflops"]) == (30, None)
    assert row["implied_share"] == pytest.approx(0.3625, abs=1e-3)


def test_times_of_different_runs_are_not_compared(tmp_path):
    root = write_samples(tmp_path, {"exact": (1.0, 0.0), "motioncache-slow": (0.5, 30.0)})
    later = sorted((root / "motioncache-slow").glob("*-prompt.json"))
    for count, expected in ((1, 2.0), (3, None)):
        for path in later[:count]:
            path.write_text(json.dumps({**json.loads(path.read_text()), "run": "second", "seconds": 0.1}))
        row = table.rows_of(collect(root))[1]
        assert (row["speedup_vs_exact"], row["psnr_db"]) == (expected, 31.0)
        assert (cell(row, "latency_s") == "–") == (expected is None), "times of two runs do not stand side by side"


def test_commits_are_short_and_all_named():
    one, other = "0123456789" * 4, "abcdefabcd" * 4 + "-dirty"
    assert commits({"commit": one}) == "commit 0123456"
    assert commits({"commit": [one, other]}) == "commits 0123456, abcdefa-dirty"


def test_only_metrics_with_a_column_are_explained(data):
    row = data["rows"][-1]
    assert ". PSNR, SSIM: against exact." in notes([row], [])
    assert ". PSNR, SSIM, LPIPS: against exact." in notes([row], [row | {"lpips": 0.1, "paper": "P", "setting": "S"}])


@pytest.fixture
def data(samples, tmp_path):
    table.make_table([samples], tmp_path / "t.json", "python -m benchmarks.table out")
    return json.loads((tmp_path / "t.json").read_text())


def test_summary_in_a_document(documents, data):
    text = documents.summary(data)
    assert "| skyreels-v2-tiny | FlowCache | 31.0 / 0.900 | – |" in text
    assert "| skyreels-v2-tiny | MotionCache | 29.5 / 0.900 | 21.0 / 0.900 |" in text
    assert "mean over 3 prompts." in text
    assert (
        f"\n`python -m benchmarks.table out` · {data['date']} · cpu · torch 2.13.0, diffusers 0.42.1 · commit abc\n"
        in text
    )


def test_differences_in_a_document(documents, data):
    lines = documents.differences(data).splitlines()
    assert "| skyreels-v2-tiny | best-matched@0.2 | flowcache-matched@0.4 | +3.00 ± 0.00 dB |" in lines
    assert not [line for line in lines if "flowcache-slow" in line], "presets have no share to compare at"


def test_parts_in_a_document(documents, data):
    lines = documents.parts(data).splitlines()
    assert (
        "| skyreels-v2-tiny | motioncache-matched@0.2 | 0.200 | 21.00 ± 2.48 | 0.9000 ± 0.0000 | -13.00 ± 0.00 |"
        in lines
    )
    assert "| skyreels-v2-tiny | best-matched@0.2 | 0.200 | 34.00 ± 2.48 | 0.9000 ± 0.0000 | – |" in lines


def test_floor_in_a_document(documents, data):
    line = "| skyreels-v2-tiny | everything, to bfloat16 | 51.00 ± 2.48 | 0.9000 ± 0.0000 | 3 |"
    assert line in documents.floor(data)


def test_methods_elsewhere_in_a_document(documents, tmp_path):
    methods = {"exact": (1.0, 0.0), "best-matched@0.3": (0.3, 33.0), "teacache-matched@0.3": (0.29, 31.0)}
    root = write_samples(tmp_path / "elsewhere", methods)
    record = json.loads((root / "experiment.json").read_text())
    write(root / "experiment.json", record | {"settings": {"steps": 50}})
    table.make_table([root], tmp_path / "t.json", "python -m benchmarks.table out")
    text = documents.elsewhere(json.loads((tmp_path / "t.json").read_text()))
    line = "| skyreels-v2-tiny, steps 50 | 32.0 (29%) | – | – | – | 34.0 (30%) | +2.0 ± 0.0 | – |"
    assert line in text and "mean over 3 prompts" in text


def test_rows_in_a_document(documents, data):
    text = documents.comparison("skyreels-v2-tiny", data)
    assert "| motioncache-matched@0.4 | 0.390 |" in text and "quoted" not in text
    assert "| skyreels-v2-tiny | motioncache-matched@0.4 | 0.390 | 29.50 ± 2.48 |" in documents.ablation(data)


def test_quoted_rows_in_a_document(documents):
    assert "| TeaCache slow / fast | 58 / 49 | 1.89× / 2.20× | 814 s / 686 s | 82.67 / 80.06 |" in documents.quoted(
        "SkyReels-V2"
    )


def test_flops_in_a_document(documents, data):
    row = {"model": "SkyReels-V2", "paper": "MotionCache", "method": "teacache-slow", "quoted_pflops": 58}
    row |= {"vanilla_pflops": 113.4, "exact_pflops": 80.6, "replayed_pflops": 40.0, "dense_pflops": 57.0}
    row |= {"implied_share": 0.72, "recorded_share": 0.49}
    text = documents.paper_flops({**data, "rows": [row]})
    line = "| SkyReels-V2 | MotionCache | teacache-slow | 58 | 113.4 | 80.6 | 40.0 | 57.0 | 0.72 | 0.49 |"
    assert line in text


def test_a_document_says_what_is_not_measured_yet(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    for name, (_, _, command) in documents.MEASURED.items():
        assert documents.table(name) == f"Not measured yet; the command is `{command}`.\n"


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_are_whole(path, monkeypatch):
    monkeypatch.setattr(experiment, "read_prompts", lambda dimensions, **sources: [("a cat", "a cat")])
    methods = experiment.Experiment.load(path).methods
    if path.stem.startswith("table1") and path.stem.endswith("tiny"):
        families = ("teacache", "flowcache", "motioncache")
        assert {f"{f}-{preset}" for f in families for preset in ("slow", "fast")} <= set(methods)
        assert {f"{f}-matched@{share}" for f in families for share in (0.6, 0.4, 0.3, 0.2)} <= set(methods)
    shares = {share for name in methods if (share := names.split_name(name)[1])}
    assert all(f"{names.BASELINE}@{share}" in methods for share in shares), "each share has FlowCache to compare with"


def reproduce(*arguments):
    command = ["bash", str(REPOSITORY / "scripts/reproduce_table1.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_tells_its_options():
    done = reproduce("--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--tiny", "--prompts N", "--processes N", "--output DIR"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tiny", "--prompts", "0"), "--prompts needs a whole number of at least 1, not '0'"),
        (("--processes",), "--processes needs a whole number"),
        (("--output",), "--output needs a folder"),
        (("--small",), "unknown option '--small'; see bash scripts/reproduce_table1.sh --help"),
    ],
)
def test_the_script_refuses_bad_options_before_it_does_anything(arguments, words):
    done = reproduce(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and words in done.stderr
