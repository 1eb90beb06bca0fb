"""The first seconds of a command: the libraries are imported, and Ctrl-C is as orderly as later."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130


def start(module: str) -> NoReturn:
    """Import a command's module, run its `main` and end with the exit code that it returns."""
    before = signal.signal(signal.SIGINT, _leave)
    main = import_module(module).main
    signal.signal(signal.SIGINT, before)
    sys.exit(main())


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    # At once: libraries in the middle of their import turn a KeyboardInterrupt into errors of their own.
    sys.stderr.write("\ninterrupted: nothing was written\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
