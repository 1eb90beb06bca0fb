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
from rich.table import Column
from rich.text import Text

NAME_WIDTH = 24
"""Columns of a stage's name beside its bar: a longer one is cut, so that 80 columns show both."""


class Reporter:
    """Shows what a command is doing. What it is told to show is text as it stands, whatever brackets are in it.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str, head: str = "") -> None:
        """One line about what happens next, behind `head` in bold letters."""
        self.console.print(Text.assemble((head, "bold"), text))

    @contextmanager
    def stage(self, name: str, iterations: int) -> Iterator[Callable[[], None]]:
        """A progress bar over a stage's iterations; the block calls what it is given after each of them."""
        name_column = Column(width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=name_column),
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
        with self.console.status(Text(text)):
            yield


class _Once(logging.Filter):
    """Lets a message through once: each stage of a command, and its warm-up, would say the same again."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new


def show_log(console: Console) -> None:
    """Show warnings of this repository's packages on the console, each of them once; no longer on an earlier one."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.name = __name__
    handler.addFilter(_Once())
    for package in ("common", "skyreels_v2_motioncache", "magi1_motioncache", "benchmarks"):
        logger = logging.getLogger(package)
        for earlier in [known for known in logger.handlers if known.name == handler.name]:
            logger.removeHandler(earlier)
        logger.addHandler(handler)
        logger.propagate = False


def quiet_libraries() -> None:
    """Turn off what diffusers and transformers say while they load: it is meant for their developers."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
