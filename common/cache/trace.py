"""The record of what was computed. Every table, FLOPs figure and picture is made from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["denoise", "refresh"]
Decision = Literal["full", "select", "reuse"]


@dataclass
class Record:
    """One chunk, step and branch.

    Attributes:
        window: window of a long video, from 0.
        iteration: iteration of the pipeline's loop in that window.
        chunk, branch, step: as in `ChunkStep`.
        role: `"denoise"`, or `"refresh"` for the pass that renews a clean chunk's K/V.
        decision: `"full"`, `"select"` or `"reuse"`.
        tokens: tokens computed, of `tokens_total`.
        kv_tokens: keys that each computed query attended to.
        seconds: time of the chunk's call. Wall time on a CPU, the device's own on CUDA.
    """

    window: int
    iteration: int
    chunk: int
    branch: str
    step: int
    role: Role
    decision: Decision
    tokens: int
    tokens_total: int
    kv_tokens: int
    seconds: float = 0.0


@dataclass
class StepMaps:
    """For pictures: a token's weight and whether it was computed, `[frames, rows, columns]` each.

    On the model's device until `Trace.finish`: bringing them over would make the host wait at every step.
    """

    record: Record
    weights: Tensor
    computed: Tensor


@dataclass
class Trace:
    """All records of one video.

    Args:
        keep_maps: also keep `StepMaps` of every denoising record; five bytes per token.

    Attributes:
        peak_bytes: the most that was held at any time, in bytes, of each kind (see `Engine.memory`) and in `total`.
    """

    keep_maps: bool = False
    records: list[Record] = field(default_factory=list)
    maps: list[StepMaps] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    _pending: list[tuple[Record, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Time the record that is added inside the block, without making the host wait for the device."""
        first = len(self.records)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._pending += [(record, start, end) for record in self.records[first:]]
        else:
            began = time.perf_counter()
            yield
            for record in self.records[first:]:
                record.seconds = time.perf_counter() - began

    def finish(self) -> None:
        """Fill in the times measured on a device, and bring the maps to the CPU."""
        for record, start, end in self._pending:
            end.synchronize()
            record.seconds = start.elapsed_time(end) / 1000
        self._pending.clear()
        for maps in self.maps:
            maps.weights, maps.computed = maps.weights.cpu(), maps.computed.cpu()

    def note_memory(self, held: dict[str, int]) -> None:
        """Raise the peaks to what is held now, in bytes by kind."""
        for kind, count in {**held, "total": sum(held.values())}.items():
            self.peak_bytes[kind] = max(self.peak_bytes.get(kind, 0), count)

    def totals(self) -> dict[str, int]:
        """Token computations done and those that exact execution of the same chunks and steps does."""
        return {
            "tokens_computed": sum(r.tokens for r in self.records),
            "tokens_total": sum(r.tokens_total for r in self.records),
        }

    def to_dict(self) -> dict[str, Any]:
        """Columns instead of rows, which makes the JSON a fifth of the size."""
        self.finish()
        rows = [asdict(r) for r in self.records]
        names = list(Record.__dataclass_fields__)
        columns = {n: [r[n] if n != "seconds" else round(r[n], 6) for r in rows] for n in names}
        return {"columns": columns, "peak_bytes": self.peak_bytes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trace:
        """Read what `to_dict` wrote."""
        columns = data["columns"]
        rows = zip(*columns.values(), strict=True)
        records = [Record(**dict(zip(columns, row, strict=True))) for row in rows]
        return cls(records=records, peak_bytes=data["peak_bytes"])
