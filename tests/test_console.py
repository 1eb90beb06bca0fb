"""What a command shows while it works, and the first seconds in which it can show nothing yet."""

import io
import logging
import subprocess
import sys

import pytest
from conftest import make_tokenizer
from rich.console import Console

from common.console import NAME_WIDTH, Reporter, show_log
from common.generator import unknown_words_warning
from common.runs import REPOSITORY


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80, record=True)


def test_brackets_are_no_markup(console):
    Reporter(console).note(", [wide shot] a [/red] circle :star:", head="models/[bold]")
    assert console.export_text() == "models/[bold], [wide shot] a [/red] circle :star:\n"


def test_long_names_leave_room_for_the_bar(console):
    reporter = Reporter(console)
    for name in ("exact", "motioncache-t0.1394-a0.6-k2-w3-table-output_motion-[residual]-hold"):
        with reporter.stage(name, 120) as advance:
            advance()
    short, long = (line for line in console.export_text().splitlines() if "1/120" in line)
    assert short.startswith("exact  ") and long.startswith("motioncache-t0.1394-a0.… ")
    assert short.index("1/120") == long.index("1/120") > NAME_WIDTH + 16 and len(short) <= 80 and "left" in short


def test_a_warning_is_shown_once(console):
    logger = logging.getLogger("common")
    handlers = list(logger.handlers)
    try:
        show_log(console)
        for chunks in (12, 12, 15):
            logger.warning("all %d latent frames are cached as one chunk", chunks)
    finally:
        logger.handlers, logger.propagate = handlers, True
    shown = console.export_text()
    assert shown.count("all 12 latent frames") == 1 and shown.count("all 15 latent frames") == 1


def test_a_word_that_is_not_known_is_named_once():
    (line,) = unknown_words_warning(make_tokenizer(), "a zebra, a blue zebra and a lion")
    assert "the words: zebra, and, lion. It" in line


INTERRUPTED = """
import os, signal
from common import starting

def library(module):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError from error

starting.import_module = library
starting.start("magi1_motioncache.cli")
"""


def test_interruption_while_the_libraries_are_imported_is_orderly():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted: nothing was written\n")


@pytest.mark.parametrize("package", ["skyreels_v2_motioncache", "magi1_motioncache"])
def test_nothing_slow_is_imported_before_that(package):
    code = f"import sys, {package}, common.starting; assert not {{'torch', 'numpy', 'yaml'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
