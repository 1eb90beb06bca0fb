"""Clocks and counters. The only place of the benchmark where a GPU differs from a CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.attention import attend

Mark = float | torch.cuda.Event
Part = tuple[Any, str, str]
"""An owner (object, module or class), the name of its function, and the label that its time is booked under."""

MODEL, ITERATION = "model", "iteration"
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
HOST_EVENTS = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


@dataclass(frozen=True)
class Clock:
    """Moments in a device's own time: CUDA events, which do not make the host wait, or the wall clock on a CPU."""

    device: torch.device

    def mark(self) -> Mark:
        """Now, after all work that was queued so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """From one mark to another; waits until the device has passed both."""
        if isinstance(end, float):
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def restart_peak(self) -> None:
        """Free what nobody holds, and measure peak memory from here on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most memory in tensors since `restart_peak`, in GiB; None where no allocator counts it."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


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


def attention_rate(clock: Clock, queries: int, keys: int, heads: int, width: int, repeats: int = 5) -> float:
    """FLOP/s of bf16 attention without a mask, with the kernel that the models use."""
    shape = {"device": clock.device, "dtype": torch.bfloat16}
    q = torch.randn(1, queries, heads, width, **shape)
    k, v = (torch.randn(1, keys, heads, width, **shape) for _ in range(2))
    return best_rate(clock, lambda: attend(q, k, v), 4.0 * queries * keys * heads * width, repeats)


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


@dataclass(frozen=True)
class Counts:
    """What one iteration asks of the host.

    Attributes:
        host_reads: values that Python read from tensors inside the model's forwards (`item`, `nonzero` and what calls
            them); on a GPU each waits for the device.
        syncs: waits for the device inside the model's forwards, copies from pageable memory included.
        loop_syncs: the same in the rest of the iteration: the solver and the pipeline's loop.
        launches: kernels launched by the whole iteration. Without CUDA this and the syncs are None.
    """

    host_reads: int
    syncs: int | None
    loop_syncs: int | None
    launches: int | None


class Counter:
    """Counts an iteration's host reads, waits and launches with PyTorch's profiler."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        self._profile = profile(activities=activities)
        self._iteration = record_function(ITERATION)
        self._running = False

    @contextmanager
    def installed(self, owner: Any, name: str) -> Iterator[None]:
        """Inside, calls of `owner.name` count as the model's."""

        def wrap(function: Callable) -> Callable:
            def labelled(*args: Any, **kwargs: Any) -> Any:
                if not self._running:
                    return function(*args, **kwargs)
                with record_function(MODEL):
                    return function(*args, **kwargs)

            return labelled

        with replaced(owner, name, wrap):
            yield

    def start(self) -> None:
        self._profile.start()
        self._iteration.__enter__()
        self._running = True

    def stop(self) -> None:
        self._running = False
        self._iteration.__exit__(None, None, None)
        self._profile.stop()

    def counts(self) -> Counts:
        """Of the iteration between `start` and `stop`."""
        # The profiler's own list of events takes minutes to build at full size; its trace file takes seconds.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        events = [e for e in events if e.get("ph") == "X" and e["cat"] in HOST_EVENTS]
        spans = {
            label: [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == label] for label in (MODEL, ITERATION)
        }

        def count(names: tuple[str, ...], label: str) -> int:
            found = (e["ts"] for e in events if e["name"].startswith(names))
            return sum(any(start <= ts <= end for start, end in spans[label]) for ts in found)

        waits, all_waits = count(SYNCS, MODEL), count(SYNCS, ITERATION)
        return Counts(
            host_reads=count(HOST_READS, MODEL),
            syncs=waits if self.cuda else None,
            loop_syncs=all_waits - waits if self.cuda else None,
            launches=count(LAUNCHES, ITERATION) if self.cuda else None,
        )
