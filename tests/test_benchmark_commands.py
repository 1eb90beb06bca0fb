"""What the commands of `benchmarks/` and `scripts/` say of themselves, and to input that cannot be."""

import importlib
import json

import pytest

from common.runs import REPOSITORY

MODULES = (
    *("calibrate", "figures", "full_size", "match", "memory", "paper_flops"),
    *("sample", "score", "score_fidelity", "table", "vbench"),
)
TINY = "configs/skyreels_v2_tiny_slow.yaml"
TABLE1 = "configs/experiments/table1_skyreels_v2_tiny.yaml"
BAD = {
    "sample": [
        (["configs/experiments/tabel1.yaml", "--output", "{tmp}/out"], "tabel1.yaml' cannot be read: No such file"),
        ([TINY, "--output", "{tmp}/out"], "unknown experiment setting"),
        ([TABLE1, "--output", "{tmp}/out", "--prompts", "-3"], "--prompts: -3 is outside its range"),
        ([TABLE1, "--ouput", "{tmp}/out"], "unknown option '--ouput'; did you mean '--output'?"),
        ([TABLE1], "the following arguments are required: --output"),
        ([TABLE1, "--output", "{tmp}/out", "--process", "2"], "did you mean '--processes'?"),
    ],
    "match": [
        ([TABLE1, "--processes", "-1"], "--processes: -1 is outside its range; allowed: at least 1"),
        (["nowhere.yaml"], "nowhere.yaml' cannot be read"),
    ],
    "calibrate": [
        (["--config", TINY, "--target", "shaer=0.3", "--output", "{tmp}/a.yaml"], "shaer"),
        (["--config", "nowhere.yaml", "--target", "share=0.3", "--output", "{tmp}/a.yaml"], "cannot be read"),
        (["--config", TINY, "--target", "share=0.3", "--output", "{tmp}/a.yaml", "--prompts", "0"], "at least 1"),
    ],
    "score": [
        (["{tmp}"], "holds no samples"),
        (["{tmp}", "--processes", "two"], "'two' is not a whole number"),
    ],
    "table": [
        (["{tmp}/nowhere", "--output", "{tmp}/t.json"], "holds no samples"),
        (["{tmp}", "--output", "{tmp}/t.csv"], "give a name that ends in .json"),
        (["--output", "{tmp}/t.json"], "the following arguments are required: DIR"),
    ],
    "vbench": [(["{tmp}"], "holds no samples"), (["{tmp}", "--gpus", "0"], "--gpus: 0 is outside its range")],
    "paper_flops": [(["{tmp}", "--output", "{tmp}/f.json"], "holds no samples")],
    "score_fidelity": [
        (["--config", TINY, "--prompts", "0", "--output", "{tmp}/f.json"], "--prompts: 0 is outside its range"),
        (["--config", "nowhere.yaml", "--output", "{tmp}/f.json"], "nowhere.yaml' cannot be read"),
        (["--config", TABLE1, "--output", "{tmp}/f.json"], "has settings of neither SkyReels-V2 nor MAGI-1"),
    ],
    "full_size": [
        (["--models", "skyreel"], "invalid choice: 'skyreel'"),
        (["--shares", "40"], "--shares: 40.0 is outside its range; allowed: 0.01 to 1"),
        (["--iterations", "0"], "--iterations: 0 is outside its range"),
        (["--replay", "nowhere.json"], "give the trace.json of a run"),
        (["--device", "gpu"], "device: 'gpu' is not allowed"),
    ],
    "memory": [
        (["--every", "9"], "--every: 9 is outside its range; allowed: 1 to 8"),
        (["--models", "magi1"], "invalid choice: 'magi1'"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_bad_input_is_one_line_and_exit_code_2(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    command = importlib.import_module(f"benchmarks.{name}")
    assert command.main([word.format(tmp=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name", MODULES)
def test_help_shows_an_example_and_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"\n    python -m benchmarks.{name}" in text
    lines = text.partition("\noptions:\n")[2].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert "  " in line.strip() or following.startswith("        "), f"{line!r} is not explained"


@pytest.mark.parametrize(
    ("marker", "content", "message"),
    [
        ("overhead", "{", "is damaged or of another kind"),
        ("overhead", json.dumps({"steps": {}, "tokens": {}}), "make it again: python -m benchmarks.overhead"),
        ("overheads", "{}", "unknown table 'overheads' between markers; did you mean 'overhead'?"),
    ],
)
def test_tables_of_what_is_no_result_are_refused(documents, marker, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    document = f"<!-- table:{marker} -->\nas it was\n<!-- /table:{marker} -->\n"
    for name in ("results", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text(document)
    (tmp_path / "results/overhead.json").write_text(content)
    assert documents.main([]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == document
