"""Work that goes on beside the caller, one piece after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread that does pieces of work in the order in which they come.

    A piece that fails is the last: those behind it are left out, and its error is raised by every later call of
    `submit` and `wait`.

    Args:
        unfinished: pieces that may be unfinished when `submit` returns, which bounds the memory that they hold. With 0
            it returns when its own piece is done.
    """

    def __init__(self, unfinished: int) -> None:
        self._unfinished = unfinished
        self._pieces: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1)

    def submit(self, work: Callable[[], None]) -> None:
        """Have a piece done behind those that were handed in before.

        Raises:
            Exception: what this piece or an earlier one has raised by now.
        """
        self._take_done(len(self._pieces))
        before = self._pieces[-1] if self._pieces else None

        def piece() -> None:
            if before is not None:
                before.result()  # done already; raises if it failed
            work()

        self._pieces.append(self._thread.submit(piece))
        self._take_done(self._unfinished)

    def wait(self) -> None:
        """Return when all pieces are done.

        Raises:
            Exception: what one of them has raised.
        """
        self._take_done(0)

    def close(self) -> None:
        """End the thread when all pieces are done. Their errors are not raised: `wait` does that."""
        self._thread.shutdown()

    def _take_done(self, left: int) -> None:
        while self._pieces and (len(self._pieces) > left or self._pieces[0].done()):
            self._pieces[0].result()  # stays in the queue if Ctrl-C ends the waiting, or if it failed
            self._pieces.popleft()
