"""The console of a command: progress of its stages, and the log messages of the library it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import transformers
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Shows what a command is doing.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """One line about what happens next."""
        self.console.print(text, highlight=False)

    @contextmanager
    def stage(self, name: str, iterations: int) -> Iterator[Callable[[], None]]:
        """A progress bar over a stage's iterations; the block calls what it is given after each of them."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=iterations)
            yield lambda: progress.advance(task)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """A line that turns while a block of unknown length runs."""
        with self.console.status(text):
            yield


def show_log(console: Console) -> None:
    """Show warnings of this repository's packages on the console."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    for package in ("common", "skyreels_v2_motioncache", "magi1_motioncache", "benchmarks"):
        logger = logging.getLogger(package)
        logger.addHandler(handler)
        logger.propagate = False


def quiet_libraries() -> None:
    """Turn off what diffusers and transformers say while they load: it is meant for their developers."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
