"""Work spread over processes of this machine."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

from rich.console import Console

from common.console import Reporter, show_log
from common.errors import UserError

Work = Callable[..., None]
"""Called with its number, how many there are, a reporter and what all are given. It takes its part by itself."""


def run_in_processes(work: Work, count: int, *given: Any) -> None:
    """Run `work` in several processes at once; one that dies leaves the others at work.

    Args:
        work: a function of a module.
        count: how many processes; the first one reports.
        given: for each of them.

    Raises:
        UserError: raised in one of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # libraries are imported once, not by each process
    complaints = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(work, rank, count, complaints, given)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    if not complaints.empty():
        raise UserError(complaints.get())


def parent_is_gone() -> bool:
    """Whether the process that started this one has ended, so that nobody waits for more."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _process(work: Work, rank: int, count: int, complaints: SimpleQueue, given: tuple[Any, ...]) -> None:
    reporter = Reporter(Console(quiet=rank > 0))
    show_log(reporter.console)
    try:
        work(rank, count, reporter, *given)
    except UserError as error:
        complaints.put(str(error))
    except KeyboardInterrupt:
        sys.exit(1)  # the first process tells the user
