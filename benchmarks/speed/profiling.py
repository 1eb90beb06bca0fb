"""What PyTorch's profiler sees of one iteration: the host's reads and waits, and the kernels that fill the GPU."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.speed.instruments import ITERATION, replaced
from common.devices import synchronize

Event = dict[str, Any]
"""A span of the profiler's trace: `name`, `cat`, `ts` and `dur`, both in microseconds."""

MODEL = "model"
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
HOST_EVENTS = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
MOST_KERNELS = 15


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


@dataclass(frozen=True)
class GpuWork:
    """What a GPU did in one iteration.

    Attributes:
        busy_seconds: in which at least one kernel or copy ran.
        kernels: name, calls and seconds of those with the most time, the longest first.
    """

    busy_seconds: float
    kernels: list[tuple[str, int, float]]


class Profiler:
    """Records one iteration with PyTorch's profiler.

    Args:
        device: that the model runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(activities=activities)
        self._iteration = record_function(ITERATION)
        self._running = False

    @contextmanager
    def installed(self, owner: Any, name: str) -> Iterator[None]:
        """Inside, calls of `owner.name` count as the model's; at its end nothing is recorded any more."""

        def wrap(function: Callable) -> Callable:
            def labelled(*args: Any, **kwargs: Any) -> Any:
                if not self._running:
                    return function(*args, **kwargs)
                with record_function(MODEL):
                    return function(*args, **kwargs)

            return labelled

        with replaced(owner, name, wrap):
            try:
                yield
            finally:
                if self._running:  # an error in between: PyTorch has one profiler, which the next row needs
                    self.stop()

    def start(self) -> None:
        synchronize(self.device)  # what was queued before is not this iteration's
        self._profile.start()
        self._iteration.__enter__()
        self._running = True

    def stop(self) -> None:
        self._running = False
        self._iteration.__exit__(None, None, None)
        self._profile.stop()  # waits for the device

    def events(self) -> list[Event]:
        """All that was recorded between `start` and `stop`."""
        # The profiler's own list of events takes minutes to build at full size; its trace file takes seconds.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        return [event for event in events if event.get("ph") == "X" and "cat" in event]


def host_counts(events: Sequence[Event], cuda: bool) -> Counts:
    """Reads, waits and launches of a recorded iteration; without `cuda` only the reads mean something."""
    events = [event for event in events if event["cat"] in HOST_EVENTS]
    spans = {
        label: [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == label] for label in (MODEL, ITERATION)
    }

    def count(names: tuple[str, ...], label: str) -> int:
        found = (e["ts"] for e in events if e["name"].startswith(names))
        return sum(any(start <= ts <= end for start, end in spans[label]) for ts in found)

    waits, all_waits = count(SYNCS, MODEL), count(SYNCS, ITERATION)
    return Counts(
        host_reads=count(HOST_READS, MODEL),
        syncs=waits if cuda else None,
        loop_syncs=all_waits - waits if cuda else None,
        launches=count(LAUNCHES, ITERATION) if cuda else None,
    )


def gpu_work(events: Sequence[Event]) -> GpuWork | None:
    """Kernels and copies of a recorded iteration; None if there were none, as on a CPU."""
    work = sorted((event for event in events if event["cat"] in GPU_EVENTS), key=lambda event: event["ts"])
    if not work:
        return None
    busy, reached = 0.0, work[0]["ts"]
    calls: dict[str, int] = defaultdict(int)
    time: dict[str, float] = defaultdict(float)
    for event in work:
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], reached))  # kernels of several streams overlap
        reached = max(reached, end)
        calls[event["name"]] += 1
        time[event["name"]] += event["dur"]
    longest = sorted(time, key=lambda name: -time[name])[:MOST_KERNELS]
    return GpuWork(busy / 1e6, [(name, calls[name], time[name] / 1e6) for name in longest])
