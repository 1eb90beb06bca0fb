"""Clocks, and the time of parts. Where memory is counted, this is where a GPU differs from a CPU."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Mark = float | torch.cuda.Event
Part = tuple[Any, str, str]
"""An owner (object, module or class), the name of its function, and the label that its time is booked under."""

ITERATION = "iteration"


@dataclass(frozen=True)
class Clock:
    """Moments in a device's own time: CUDA events, which do not make the host wait, or the wall clock on a CPU."""

    device: torch.device

    def mark(self) -> Mark:
        """Now, after all work that was queued so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """From one mark to another; waits until the device has passed both."""
        if isinstance(end, float):
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def restart_peak(self) -> None:
        """Free what nobody holds, and measure peak memory from here on."""
        gc.collect()  # a model and the hooks of its last row hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most memory in tensors since `restart_peak`, in GiB; None where no allocator counts it."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None

    @contextmanager
    def memory_cap(self, gib: float) -> Iterator[bool]:
        """Inside, tensors and what the allocator keeps for later ones take at most `gib`, or it raises.

        What CUDA itself needs, about half a GiB, is outside the cap.

        Yields:
            Whether there is a cap: nothing limits a CPU's memory.
        """
        if self.device.type != "cuda":
            yield False
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), self.device.index)
        try:
            yield True
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device.index)


def best_rate(clock: Clock, work: Callable[[], Any], flops: float, repeats: int) -> float:
    """FLOP/s of the fastest of `repeats` calls, after one that is not counted."""
    work()
    marks = [clock.mark()]
    for _ in range(repeats):
        work()
        marks.append(clock.mark())
    return flops / min(clock.seconds(a, b) for a, b in pairwise(marks))


def matmul_ceiling(clock: Clock, size: int, dtype: torch.dtype = torch.bfloat16, repeats: int = 20) -> float:
    """The FLOP/s that a product of two square matrices of normal numbers reaches; power limits depend on the values."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    return best_rate(clock, lambda: a @ b, 2.0 * size**3, repeats)


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, `owner.name` is `wrap(owner.name)`."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@dataclass
class _Span:
    label: str
    start: Mark
    end: Mark | None = None
    inner: list[_Span] = field(default_factory=list)


class Regions:
    """Time by label, each without the labelled parts inside it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._whole: _Span | None = None
        self._open: list[_Span] = []

    @contextmanager
    def installed(self, parts: Sequence[Part]) -> Iterator[None]:
        """Inside, calls of the parts are timed while the regions are running."""
        with ExitStack() as stack:
            for owner, name, label in parts:
                stack.enter_context(replaced(owner, name, lambda function, label=label: self._timed(function, label)))
            yield

    def start(self) -> None:
        self._whole = _Span(ITERATION, self.clock.mark())
        self._open = [self._whole]

    def stop(self) -> None:
        self._whole.end = self.clock.mark()
        self._open = []

    def seconds(self) -> dict[str, float]:
        """Seconds by label, the largest first; `"iteration"` is what no part accounts for."""
        total: dict[str, float] = defaultdict(float)
        waiting = [self._whole]
        while waiting:
            span = waiting.pop()
            inner = sum(self.clock.seconds(s.start, s.end) for s in span.inner)
            total[span.label] += self.clock.seconds(span.start, span.end) - inner
            waiting += span.inner
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def _timed(self, function: Callable, label: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._open:
                return function(*args, **kwargs)
            span = _Span(label, self.clock.mark())
            self._open[-1].inner.append(span)
            self._open.append(span)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                span.end = self.clock.mark()

        return timed
