"""Runs that a search needs: each is made once, by one process or several, and its figures are kept in a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from torch import Tensor

from benchmarks.samples import sample_fingerprint
from benchmarks.search import NEVER, Point
from benchmarks.subject import EXACT, Subject, one_thread, sample
from benchmarks.takes import Take
from common import metrics
from common.cache import MotionCacheConfig, Record, Trace
from common.cache.calibration import ChangeRecorder, StepChange, StepSkipper
from common.cache.foretell import foretell
from common.console import Reporter, quiet_libraries
from common.files import atomic_path
from common.generator import Generator
from common.settings import RunSettings

RECORDING = MotionCacheConfig(distance="input", alpha=1.0)
"""Any way of caching would do: the recorder computes everything, and needs to hear of it."""

Load = Callable[[], Subject]


@dataclass(frozen=True)
class Run:
    """One video, made in one way.

    Attributes:
        kind: `exact`, `changes` (exact, noting how much changes from step to step), `skips` (the first chunk, whole
            and then without each of its steps) or `cached`.
        take: what to show.
        cache: how to cache.
        reference: frames of the exact video, which an exact run writes and a cached one is compared with; None if
            frames are not needed.
    """

    kind: Literal["exact", "changes", "skips", "cached"]
    take: Take
    cache: MotionCacheConfig
    reference: Path | None = None


class Runs:
    """Makes runs of one model and remembers them.

    Args:
        load: loads the model; called once in each process that makes runs. Must be picklable for several processes.
        settings: of the model.
        weights: digest of the checkpoint.
        ledger: file of figures, a JSON line each. A line counts for the settings, weights and run that it was made
            with; others may stand beside it. Frames of exact videos go into a folder beside it.
        reporter: shows progress.
        processes: 1 makes runs here; more are started with one thread each.
    """

    def __init__(
        self, load: Load, settings: RunSettings, weights: str, ledger: Path, reporter: Reporter, processes: int = 1
    ) -> None:
        self.settings, self.weights, self.ledger, self.reporter = settings, weights, ledger, reporter
        self.references = ledger.with_suffix(".references")
        self._load = functools.cache(load)
        self._known = _read(ledger)
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # the libraries are imported once, not by each process
            self._pool = ProcessPoolExecutor(processes, context, _start_process, (load,))

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def exact(self, takes: Sequence[Take], frames: bool = False) -> list[dict[str, Any]]:
        """Figures of exact runs, in order: `flops`, `seconds`, `records` and, for each of them, `savings` and
        `token_savings`."""
        cache = EXACT.replace(state_device=self.settings.cache.state_device)
        return self._results([Run("exact", t, cache, self._reference(t) if frames else None) for t in takes])

    def changes(self, takes: Sequence[Take]) -> list[StepChange]:
        """How much changed from step to step in exact runs."""
        results = self._results([Run("changes", take, RECORDING) for take in takes])
        return [StepChange(**sample) for result in results for sample in result["samples"]]

    def skips(self, cache: MotionCacheConfig, takes: Sequence[Take]) -> list[list[float]]:
        """For each video and step, the error in the first chunk's latents when that step alone is reused (RMS)."""
        reusing = RECORDING.replace(
            reuse=cache.reuse,
            extrapolation=cache.extrapolation,
            extrapolation_weight=cache.extrapolation_weight,
            state_device=cache.state_device,
        )
        return [result["errors"] for result in self._results([Run("skips", take, reusing) for take in takes])]

    def point(self, cache: MotionCacheConfig, takes: Sequence[Take], frames: bool) -> Point:
        """What a way of caching gives against exact execution.

        Args:
            cache: how to cache.
            takes: videos to make.
            frames: whether to compare frames.
        """
        runs = [Run("cached", take, cache, self._reference(take) if frames else None) for take in takes]
        exact = self.exact(takes, frames and any(self._key(run) not in self._known for run in runs))
        cached = self._results(runs)
        psnr = [result["psnr_db"] for result in cached] if frames else []
        return Point(
            cache.threshold,
            float(np.mean([c["flops"] / e["flops"] for c, e in zip(cached, exact, strict=True)])),
            sum(e["seconds"] for e in exact) / sum(c["seconds"] for c in cached),
            float(np.mean(psnr)) if psnr else None,
            metrics.paired_difference(psnr, [0.0] * len(psnr)).half_width if len(psnr) > 1 else None,
            len(takes),
        )

    def foretold_share(self, cache: MotionCacheConfig, take: Take) -> float:
        """Share of exact's FLOPs of a run that need not be made (see `is_foretellable`)."""
        exact = self.exact([take])[0]
        told = foretell([Record(*row) for row in exact["records"]], cache)
        saved = sum(
            part * (record.tokens_total - record.tokens) if record.tokens else whole
            for whole, part, record in zip(exact["savings"], exact["token_savings"], told, strict=True)
        )
        return 1 - saved / exact["flops"]

    def forget_references(self) -> None:
        """Delete the frames of exact videos: they are large, and can be made again."""
        for file in self.references.glob("*.npy"):
            file.unlink()
        if self.references.is_dir():
            self.references.rmdir()

    def _results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        keys = [self._key(run) for run in runs]
        missing = {key: run for key, run in zip(keys, runs, strict=True) if not self._is_done(key, run)}
        if missing:
            with self.reporter.stage(_label(runs[0]), len(missing)) as advance:
                for key, result in self._made(missing):
                    self._add(key, missing[key], result)
                    advance()
        return [self._known[key] for key in keys]

    def _made(self, missing: dict[str, Run]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Results by key, as they come."""
        if self._pool is None:
            for key, run in missing.items():
                yield key, make(self._load(), run)
        else:
            futures: dict[Future, str] = {self._pool.submit(_make_there, run): key for key, run in missing.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def _is_done(self, key: str, run: Run) -> bool:
        lost = run.kind == "exact" and run.reference is not None and not run.reference.is_file()
        return key in self._known and not lost

    def _add(self, key: str, run: Run, result: dict[str, Any]) -> None:
        self._known[key] = result
        about = {"kind": run.kind, "cache": run.cache.tag, **run.take._asdict()}
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **about, "result": result}, allow_nan=False) + "\n"
        with self.ledger.open("ab", buffering=0) as file:  # one write: other commands may add to the same file
            file.write(line.encode())

    def _key(self, run: Run) -> str:
        config = {**self.settings.to_dict(), **run.take._asdict(), "cache": run.cache.to_dict()}
        compared = "-compared" if run.kind == "cached" and run.reference is not None else ""
        return f"{run.kind}{compared}-{sample_fingerprint(config, self.weights)}"

    def _reference(self, take: Take) -> Path:
        cache = EXACT.replace(state_device=self.settings.cache.state_device)
        return self.references / f"{self._key(Run('exact', take, cache))}.npy"


def make(subject: Subject, run: Run) -> dict[str, Any]:
    """Make a run with a loaded model; plain figures, as they are written to the file."""
    generator = subject.generator(*run.take)
    if run.kind == "skips":
        return {"errors": skip_errors(generator, run.cache)}
    recorder = ChangeRecorder() if run.kind == "changes" else None
    made = sample(generator, run.cache, recorder, decode=run.reference is not None)
    figures: dict[str, Any] = {"flops": made.flops, "seconds": made.seconds, "token_share": made.share}
    if recorder is not None:
        figures["samples"] = [dataclasses.asdict(change) for change in recorder.samples]
    if run.kind == "exact":
        figures["records"] = [list(dataclasses.astuple(record)) for record in made.trace.records]
        figures["savings"] = savings(generator, made.trace)
        figures["token_savings"] = token_savings(generator, made.trace)
    if run.reference is not None:
        frames = np.round(np.clip(made.frames, 0, 1) * 255).astype(np.uint8)  # as a video file holds them
        if run.kind == "exact":
            run.reference.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(run.reference) as partial:
                np.save(partial, frames)
        else:
            figures["psnr_db"] = metrics.psnr(frames, np.load(run.reference))
    return figures


def skip_errors(generator: Generator, cache: MotionCacheConfig) -> list[float]:
    """RMS error of the first chunk's finished latents when one step alone is reused, `[steps]`; 0 for step 0."""

    def first_chunk(skip: int | None) -> Tensor:
        policy = StepSkipper(skip)
        generator.attach(cache, keep_maps=False, policy=policy)
        try:  # an iteration more than it has steps: then it is handed over
            latents = generator.run(stop_after=generator.settings.steps + 1).latents
        finally:
            generator.detach()
        return latents[:, :, : policy.frames].float()

    exact = first_chunk(None)
    steps = range(1, generator.settings.steps)
    return [0.0] + [float((first_chunk(step) - exact).square().mean().sqrt()) for step in steps]


def savings(generator: Generator, trace: Trace) -> list[float]:
    """FLOPs that each record of a trace would take less if its tokens were reused."""
    return _less(generator, trace, 0)


def token_savings(generator: Generator, trace: Trace) -> list[float]:
    """FLOPs that each record of a trace would take less per reused token, as long as one of its tokens is computed."""
    return [less / max(r.tokens - 1, 1) for less, r in zip(_less(generator, trace, 1), trace.records, strict=True)]


def _less(generator: Generator, trace: Trace, tokens: int) -> list[float]:
    """What the FLOPs of each record exceed those with so many tokens by."""
    known: dict[tuple, float] = {}
    found = []
    for record in trace.records:
        kind = (record.branch, record.role, record.kv_tokens, record.tokens)
        if kind not in known:
            # Behind a whole step, which has all that is computed once for many.
            steps = (record, dataclasses.replace(record, tokens=tokens))
            full, rest = (generator.trace_flops(Trace(records=[record, step])) for step in steps)
            known[kind] = full - rest
        found.append(known[kind])
    return found


def warm(load: Load) -> Subject:
    """A loaded model that has run one iteration: what is set up at first use is not charged to the first run."""
    subject = load()
    generator = subject.generator(subject.settings.prompt, 0)
    generator.attach(EXACT, keep_maps=False)
    try:
        generator.run(stop_after=1)
    finally:
        generator.detach()
    return subject


def _label(run: Run) -> str:
    if run.kind == "cached":
        return "warm-up alone" if run.cache.threshold == NEVER else f"threshold {run.cache.threshold:g}"
    return {"exact": "exact", "changes": "changes per step", "skips": "each step left out"}[run.kind]


def _read(ledger: Path) -> dict[str, dict[str, Any]]:
    """Results by key. A line that a kill cut short is left out, and ended, so that the next one stands alone."""
    if not ledger.exists():
        return {}
    text = ledger.read_text(encoding="utf-8")
    known = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        known[entry["key"]] = entry["result"]
    if text and not text.endswith("\n"):
        with ledger.open("a", encoding="utf-8") as file:
            file.write("\n")
    return known


_loaded: Load  # of a process that makes runs, set when it starts


def _start_process(load: Load) -> None:
    global _loaded
    one_thread()
    quiet_libraries()
    _loaded = functools.cache(load)


def _make_there(run: Run) -> dict[str, Any]:
    return make(_loaded(), run)
