"""What a run leaves on disk when parts of its videos are written beside the denoising, however it ends."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from common import job
from common.background import Background
from common.cli import Interrupted
from common.compare import Comparison
from common.errors import UserError
from common.video import GrowingVideo, read_video
from skyreels_v2_motioncache.settings import RunSettings

PART = np.zeros((4, 16, 16, 3), np.float32)


class PartsJob(job.Job):
    """A run without a model."""

    smaller = "fewer pixels"

    def check(self, image, video):
        return ""

    def load(self, image, video):
        return None

    def warnings(self, generator):
        return []


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(end)` hands two parts of four frames over as a GPU run does, calls `end`, and gives the folder."""
    monkeypatch.setattr(job, "Background", lambda unfinished: Background(job.PARTS_IN_HAND))
    folder = tmp_path / "out"

    def run(end) -> Path:
        def compare(generator, method, cache, reporter, on_frames, only_method):
            on_frames("stock", PART)
            for _ in range(2):
                on_frames("exact", PART)
            return end()

        monkeypatch.setattr(job, "compare", compare)
        settings = RunSettings("m", "p", height=16, width=16, num_frames=13, device="cpu")
        PartsJob(settings, "exact-twin", Path("c.yaml"), folder, "", console=Console(file=StringIO())).run()
        return folder

    run.folder = folder
    return run


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
    with pytest.raises(OSError, match="No space left on device"):
        run(Comparison)
    assert [file.name for file in run.folder.iterdir()] == ["exact.mp4"]
    assert len(read_video(run.folder / "exact.mp4")) == 4


def test_another_error_is_told_and_leaves_the_parts_in_hand(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    assert len(read_video(run.folder / "exact.mp4")) == 8
