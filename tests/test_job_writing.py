"""What a run leaves on disk when parts of its videos are written beside the denoising, however it ends."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_runs import make_trace

from common import job
from common.background import Background
from common.cli import Interrupted
from common.compare import Comparison, NotFiniteError
from common.errors import UserError
from common.runs import Stage
from common.video import GrowingVideo, read_video
from skyreels_v2_motioncache.settings import RunSettings

PART = np.zeros((4, 16, 16, 3), np.float32)


class PartsGenerator:
    """What a job asks of a generator when the comparison is made."""

    def with_given(self, frames):
        return frames

    def chunk_frames(self, frames, window, chunk):
        return frames[:2]


class PartsJob(job.Job):
    """A run without a model."""

    smaller = "fewer pixels"

    def check(self, image, video):
        return ""

    def load(self, image, video):
        return PartsGenerator()

    def warnings(self, generator):
        return []


class Run:
    """`run(end)` hands two parts of four frames over as a GPU run does, calls `end`, and gives the folder."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.folder = folder
        self.settings = {"model": "m", "prompt": "p", "height": 16, "width": 16, "num_frames": 13, "device": "cpu"}
        self.console = Console(file=StringIO(), record=True, width=200)
        self._monkeypatch = monkeypatch

    def __call__(self, end) -> Path:
        def compare(generator, method, cache, reporter, on_frames, only_method):
            on_frames("stock", PART)
            for _ in range(2):
                on_frames("exact", PART)
            return end()

        self._monkeypatch.setattr(job, "compare", compare)
        settings = RunSettings(**self.settings)
        PartsJob(settings, "exact-twin", Path("c.yaml"), self.folder, "", console=self.console).run()
        return self.folder


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    monkeypatch.setattr(job, "Background", lambda unfinished: Background(job.PARTS_IN_HAND))
    return Run(monkeypatch, tmp_path / "out")


def finished() -> Comparison:
    """What a comparison leaves behind: two stages, a video of each, and a trace with maps."""
    stages = [Stage("exact", 2.0, 2e9, 96), Stage("exact-twin", 1.0, 1e9, 48, psnr_db=30.0, ssim=0.9)]
    videos = {stage.name: np.zeros((13, 16, 16, 3), np.float32) for stage in stages}
    return Comparison(stages, make_trace(), 96, videos)


def interrupt():
    raise KeyboardInterrupt


def test_an_interruption_waits_for_the_parts_in_hand_and_names_them(run):
    with pytest.raises(Interrupted, match=r"exact\.mp4 \(frames 1 to 8 of 13\)$"):
        run(interrupt)
    assert [file.name for file in run.folder.iterdir()] == ["exact.mp4"]
    assert len(read_video(run.folder / "exact.mp4")) == 8


def test_a_second_interruption_still_says_what_is_there(run, monkeypatch):
    monkeypatch.setattr(Background, "wait", lambda self: interrupt())
    with pytest.raises(Interrupted, match=r"nothing was complete yet|exact\.mp4"):
        run(interrupt)
    assert len(read_video(run.folder / "exact.mp4")) == 8


def test_too_small_a_gpu_waits_for_the_parts_in_hand_and_names_them(run):
    def end():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"use fewer pixels; complete in .*exact\.mp4 \(frames 1 to 8 of 13\)$"):
        run(end)


def test_a_part_that_cannot_be_written_ends_the_run(run, monkeypatch):
    """Even the last one, after which nothing is handed over; what came before it stays, and nothing is summed up."""
    append = GrowingVideo.append

    def full(self, frames):
        if self.frames:
            raise OSError("No space left on device")
        append(self, frames)

    monkeypatch.setattr(GrowingVideo, "append", full)
    with pytest.raises(
        UserError, match=r"cannot write to .*: No space left on device; .*exact\.mp4 \(frames 1 to 4 of 13\)$"
    ):
        run(Comparison)
    assert [file.name for file in run.folder.iterdir()] == ["exact.mp4"]
    assert len(read_video(run.folder / "exact.mp4")) == 4


def test_numbers_beyond_the_dtype_end_the_run(run):
    def end():
        raise NotFiniteError("exact: the latents are not finite after iteration 1")

    run.settings["dtype"] = "float16"
    with pytest.raises(
        UserError, match=r"not finite .*, with dtype float16; use --dtype bfloat16; complete in .*8 of 13"
    ):
        run(end)


@pytest.mark.parametrize("failing", ["side_by_side", "motion_picture", "write_video"])
def test_no_picture_can_cost_the_figures(run, monkeypatch, failing):
    """Whatever goes wrong with them, the table is shown and the figures are written."""

    def fail(*args):
        raise OSError(28, "No space left on device") if failing == "write_video" else ZeroDivisionError

    monkeypatch.setattr(job, failing, fail)
    with pytest.raises(UserError if failing == "write_video" else ZeroDivisionError):
        run(finished)
    assert json.loads((run.folder / "summary.json").read_text())["tokens_total"] == 96
    assert (run.folder / "trace.json").exists() and not (run.folder / "motion.png").exists()
    assert "PSNR" in run.console.export_text()


def test_the_table_is_shown_on_a_full_disk(run, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_json", fail)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; complete in .*: exact\.mp4"):
        run(finished)
    assert "PSNR" in run.console.export_text()


def test_an_earlier_runs_results_are_set_aside_and_not_claimed(run):
    run.folder.mkdir()
    for name in ("side_by_side.mp4", "summary.json", "notes.txt"):
        (run.folder / name).write_text("earlier")
    with pytest.raises(Interrupted, match=r"complete in \S+: exact\.mp4 \(frames 1 to 8 of 13\)$"):
        run(interrupt)
    assert {file.name for file in run.folder.iterdir()} == {"earlier-1", "exact.mp4", "notes.txt"}
    assert {file.name for file in (run.folder / "earlier-1").iterdir()} == {"side_by_side.mp4", "summary.json"}
    assert "now in" in run.console.export_text()


def test_what_is_listed_is_what_was_written(run):
    run.folder.mkdir()
    (run.folder / "notes.txt").write_text("mine")
    run(finished)
    written = {"exact.mp4", "side_by_side.mp4", "motion.png", "trace.json", "summary.json"}
    shown = run.console.export_text()
    assert all(str(run.folder / name) in shown for name in written) and "notes.txt" not in shown
    assert {file.name for file in run.folder.iterdir()} == {*written, "notes.txt"}


def test_user_text_is_shown_as_it_stands(run):
    run.settings.update(model="models/[blue]", prompt="[wide shot] a 'b' [/red] circle :star: \\[x]")
    run.folder = run.folder.parent / "[x]"
    run(finished)
    shown = run.console.export_text()
    assert f'"{run.settings["prompt"]}"' in shown and shown.count("models/[blue]") == 2
    assert str(run.folder / "summary.json") in shown


def test_another_error_is_told_and_leaves_the_parts_in_hand(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    assert len(read_video(run.folder / "exact.mp4")) == 8
