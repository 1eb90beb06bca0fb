"""What the tests of both models' commands do with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.runs import REPOSITORY

FILES = {"video.mp4", "exact.mp4", "side_by_side.mp4", "motion.png", "trace.json", "summary.json"}
SUMMARY_KEYS = (
    "model method config seed device dtype height width num_frames steps wall_seconds flops tokens_computed "
    "tokens_total speedup_vs_stock speedup_vs_exact psnr_db ssim versions commit"
)
OPTIONS = (
    "prompt preset config model image video num-frames height width steps seed guidance-scale output device dtype "
    "offload no-compare set"
)
Run = Callable[..., tuple[Path, int]]


def runner(main: Callable[[list[str]], int], model: Path, small: list[str], tmp_path_factory) -> Run:
    """A command in this process: what it returns takes options and gives the folder of results and the exit code.

    Args:
        main: the command.
        model: checkpoint, where the options name none.
        small: options that make a video in seconds.
        tmp_path_factory: pytest's.
    """

    def run(*options: str) -> tuple[Path, int]:
        folder = tmp_path_factory.mktemp("run") / "out"
        given = [] if "--model" in options else ["--model", str(model)]
        return folder, main([*given, *small, "--output", str(folder), *options])

    return run


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's `summary.json`."""
    return json.loads((folder / "summary.json").read_text())


def assert_one_line(run: Run, capsys, options: list[str], message: str) -> None:
    """Bad input gives a line with the message, exit code 2 and no folder."""
    folder, code = run(*options)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert not folder.exists(), "bad input leaves no folder behind"


def interrupt(module: str, options: list[str], folder: Path) -> str:
    """Start a command, press Ctrl-C as soon as `exact.mp4` is there, and return what it says on the standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *options, "--output", str(folder)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (folder / "exact.mp4").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [file.name for file in folder.iterdir()] == ["exact.mp4"]
    return errors
