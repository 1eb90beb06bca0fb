import io
import json
import re
import subprocess
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from common import files, runs
from common.cache import Record, Trace
from common.cache.trace import StepMaps
from common.errors import UserError
from common.report import COMPUTED_COLOUR, motion_picture, pick_chunk, scaled, stage_table

STAGES = [
    runs.Stage("stock", 40.0, 8e12, 3000),
    runs.Stage("exact", 20.0, 4e12, 2000),
    runs.Stage("motioncache-slow", 8.0, 1e12, 500, psnr_db=31.25, ssim=0.95),
]


def test_output_folders_are_named_by_time_model_and_method(tmp_path):
    folder = runs.default_output("Skywork/SkyReels-V2-DF-1.3B", "motioncache t0.1", tmp_path)
    assert re.fullmatch(r"\d{8}-\d{6}-skyreels-v2-df-1.3b-motioncache-t0.1", folder.name)


def test_output_folders_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20260101-000000")
    first = runs.default_output("m", "exact", tmp_path)
    first.mkdir()
    assert runs.default_output("m", "exact", tmp_path).name == "20260101-000000-m-exact-2"


def test_summary_compares_the_last_stage_with_the_others():
    facts = {"model": "m", "method": "motioncache-slow", "seed": 1}
    summary = runs.summary(STAGES, 2000, facts)
    assert summary["speedup_vs_stock"] == 5.0 and summary["speedup_vs_exact"] == 2.5
    assert (summary["wall_seconds"], summary["flops"]) == (8.0, 1e12)
    assert (summary["tokens_computed"], summary["tokens_total"]) == (500, 2000)
    assert (summary["psnr_db"], summary["ssim"]) == (31.25, 0.95)
    assert summary["model"] == "m" and set(summary["versions"]) == set(runs.PACKAGES)
    assert [stage["name"] for stage in summary["stages"]] == ["stock", "exact", "motioncache-slow"]


def test_summary_without_comparison_has_empty_figures():
    summary = runs.summary(STAGES[2:], 2000, {})
    assert summary["speedup_vs_stock"] is None and summary["speedup_vs_exact"] is None


def test_versions_name_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("torch", "no-such-package"))
    versions = runs.versions()
    assert versions["torch"] == runs.metadata.version("torch") and versions["no-such-package"] is None


def test_commit_tells_of_changes_and_of_no_repository(tmp_path):
    assert runs.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = runs.git_commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/new.json").write_text("{}")
    subprocess.run([*git, "add", "."], check=True)
    assert runs.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert runs.git_commit(tmp_path) == f"{commit}-dirty"


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"psnr": 1.5, "text": "τ"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"psnr": float("inf")})
    assert json.loads(path.read_text()) == {"psnr": 1.5, "text": "τ"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-1", 0.1), ("1.5e3", 1500.0), ("-2E+2", -200.0), (".5e1", 5.0), ("1.e1", 10.0), ("e1", "e1"), ("1e", "1e")],
)
def test_numbers_may_have_exponents(tmp_path, text, value):
    """YAML 1.1 would take most of these for text."""
    path = tmp_path / "config.yaml"
    path.write_text(f"threshold: {text}\nlist: [{text}]\ntext: '{text}'")
    read = files.read_yaml(path)
    assert read == {"threshold": value, "list": [value], "text": text}
    assert type(read["threshold"]) is type(value)


def test_results_are_set_aside_as_often_as_needed(tmp_path):
    assert files.set_aside(tmp_path, ["a", "b"]) is None
    for number, text in enumerate(("first", "second"), start=1):
        (tmp_path / "a").write_text(text)
        (tmp_path / "mine").write_text(text)
        assert files.set_aside(tmp_path, ["a", "b"]) == tmp_path / f"earlier-{number}"
    assert [(tmp_path / f"earlier-{n}" / "a").read_text() for n in (1, 2)] == ["first", "second"]
    assert {file.name for file in tmp_path.iterdir()} == {"mine", "earlier-1", "earlier-2"}


@pytest.mark.parametrize("text", ["a: [1, 2", "just words", "- 1\n- 2", ""])
def test_broken_yaml_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml.*give lines of"):
        files.read_yaml(path)


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken/run.*choose another --output"):
        files.make_output_folder(tmp_path / "taken" / "run")


def test_table_fits_eighty_columns_and_marks_estimates():
    stages = [
        runs.Stage("stock", 1540.0, 113.4e15, 27_500_000, measured_iterations=3),
        runs.Stage("exact", 1000.0, 79.4e15, 17_500_000),
        runs.Stage("motioncache-slow", 400.0, 31.0e15, 7_500_000, psnr_db=31.25, ssim=0.95),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(stage_table(stages, 17_500_000, "model"))
    text = console.export_text()
    assert "113.4 P" in text and "≈1540 s" in text and "scaled up from 3 measured iterations" in text
    assert "motioncache-slow" in text and "31.25" in text and "2.50×" in text and "…" not in text


def test_brackets_in_a_title_are_no_markup():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(stage_table(STAGES, 2000, "/tmp/[bold]/a [/red] :star:"))
    assert "/tmp/[bold]/a [/red] :star:" in console.export_text()


@pytest.mark.parametrize(("count", "text"), [(113.4e15, "113.4 P"), (2.5e12, "2.5 T"), (999, "999"), (1500, "1.5 k")])
def test_counts_get_a_prefix(count, text):
    assert scaled(count) == text


def make_trace() -> Trace:
    """Two chunks of 2 frames of 4x6 tokens; tokens are chosen in the second chunk only."""
    trace = Trace(keep_maps=True)
    for step in range(6):
        for chunk in range(2):
            chosen = chunk == 1 and step in (3, 5)
            record = Record(0, step, chunk, "cond", step, "denoise", "select" if chosen else "full", 24, 48, 96)
            computed = torch.zeros(2, 4, 6, dtype=torch.bool)
            computed[:, :, :3] = True
            trace.maps.append(StepMaps(record, torch.linspace(0.6, 1, 48).view(2, 4, 6), computed))
    return trace


def test_motion_picture_shows_the_chunk_where_tokens_were_chosen(tmp_path):
    trace = make_trace()
    assert pick_chunk(trace) == (0, 1)
    frames = np.full((2, 32, 48, 3), 0.9, np.float32)
    motion_picture(tmp_path / "motion.png", trace, 0, 1, frames, "title")
    picture = np.asarray(Image.open(tmp_path / "motion.png").convert("RGB")).astype(int)
    grey = 110 + 0.5 * 230
    tinted = (0.4 * grey + 0.6 * np.array(COMPUTED_COLOUR)).astype(int)
    assert (picture == 230).all(-1).sum() > 10_000, "decoded frames are shown"
    assert (picture == tinted).all(-1).sum() > 10_000, "computed tokens are tinted"
    assert (picture == int(grey)).all(-1).sum() > 5_000, "reused tokens are grey"
    assert [f.name for f in tmp_path.iterdir()] == ["motion.png"]


@pytest.mark.parametrize(
    "prompt",
    ["costs $^$ 5_", "two\nlines\tof text", "一只白鹭站在浅水中" * 30, "word " * 200, "W" * 500, "x"],
    ids=["tex", "lines", "ideographs", "long", "wide", "short"],
)
def test_any_prompt_is_one_line_within_the_picture(tmp_path, prompt, monkeypatch):
    titles, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (titles.append(self._suptitle), savefig(self, path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of characters that the font lacks
        motion_picture(tmp_path / "motion.png", make_trace(), 0, 1, np.zeros((2, 32, 48, 3), np.float32), prompt)
    (title,) = titles
    shown, whole = title.get_text(), " ".join(prompt.split())
    end = title.get_window_extent().x1 / title.get_figure().bbox.x1
    assert end < 1
    assert shown == whole or (whole.startswith(shown.removesuffix("…")) and shown.endswith("…") and end > 0.9)
    assert (tmp_path / "motion.png").stat().st_size > 0


def test_motion_picture_needs_maps():
    with pytest.raises(ValueError, match="keep_maps"):
        pick_chunk(Trace())
