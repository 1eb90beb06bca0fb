"""One process's share of an experiment's videos."""

from __future__ import annotations

import logging
import traceback
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import Experiment, Method, Prompt
from benchmarks.processes import parent_is_gone
from benchmarks.samples import ERROR, SampleFolder, planned_config, sample_fingerprint
from benchmarks.subject import Subject, load_subject, one_thread, sample
from common.cache import MotionCacheConfig, Trace
from common.compare import EXACT
from common.console import Reporter, quiet_libraries
from common.devices import dtype_name, resolve_dtype
from common.errors import UserError
from common.generator import Generator
from common.runs import git_commit, versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where one process computes, and which part is its own.

    Attributes:
        rank, world: it makes the prompts of this number modulo the number of processes.
        device: its own.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def of(cls, device: torch.device, rank: int, world: int, local_rank: int) -> Place:
        """The place of a process.

        Args:
            device: of the settings; `cuda` without a number gives each process of a machine a GPU of its own.
            rank, world: among all processes.
            local_rank: among those of the machine.

        Raises:
            UserError: the machine has fewer GPUs than processes.
        """
        if device.type != "cuda" or device.index is not None:
            return cls(rank, world, device)
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank + 1} of this machine finds no GPU of its own among {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        return cls(rank, world, torch.device("cuda", local_rank))


@dataclass(frozen=True)
class Plan:
    """What is to be made, and where it goes.

    Attributes:
        experiment: what to make.
        folder: where to.
        weights: of `weights_digest`.
    """

    experiment: Experiment
    folder: SampleFolder
    weights: str

    def fingerprint(self, method: Method, prompt: Prompt) -> str:
        """Of the sample that is asked for."""
        return sample_fingerprint(planned_config(self.experiment, method, prompt), self.weights)

    def is_finished(self, method: Method, prompt: Prompt) -> bool:
        """Whether the sample is there, whole and as it is asked for."""
        summary = self.folder.summary(method.name, prompt.stem)
        return summary is not None and summary["fingerprint"] == self.fingerprint(method, prompt)

    def unfinished(self, prompt: Prompt) -> list[Method]:
        """The methods that have not made a prompt's video."""
        return [method for method in self.experiment.methods.values() if not self.is_finished(method, prompt)]

    def missing(self) -> list[str]:
        """A line for each sample that is not finished, with the reason where it is known."""
        lines = []
        for prompt in self.experiment.prompts:
            for method in self.unfinished(prompt):
                error = self.folder.file(method.name, prompt.stem, ERROR)
                why = error.read_text(encoding="utf-8").rstrip().rpartition("\n")[2] if error.is_file() else "not begun"
                lines.append(f"{method.name}, {prompt.stem}: {why}")
        return lines


def make_share(plan: Plan, place: Place, reporter: Reporter) -> None:
    """Make what is unfinished of a process's prompts. A sample that fails is noted in a file, and the next one is made.

    Raises:
        UserError: the model cannot be loaded with the settings.
    """
    quiet_libraries()
    share = plan.experiment.prompts[place.rank :: place.world]
    work = [(prompt, methods) for prompt in share if (methods := plan.unfinished(prompt))]
    if not work:
        return
    if place.device.type == "cpu":
        one_thread()  # however many processes there are: neither bits nor times depend on it
    with reporter.busy("loading the model"):
        sampler = Sampler(plan, place.device, [method for _, methods in work for method in methods])
    of_all = f" ({place.world} processes)" if place.world > 1 else ""
    with reporter.stage("samples" + of_all, sum(len(methods) for _, methods in work)) as advance:
        for prompt, methods in work:
            generators: dict[torch.dtype, Generator] = {}
            for method in methods:
                if parent_is_gone():
                    return
                _try(plan, sampler, method, prompt, generators)
                advance()


def _try(plan: Plan, sampler: Sampler, method: Method, prompt: Prompt, generators: dict[Any, Generator]) -> None:
    note = plan.folder.file(method.name, prompt.stem, ERROR)
    note.unlink(missing_ok=True)
    try:
        sampler.make(method, prompt, generators)
    except Exception as error:
        logger.warning("%s, %s: %s", method.name, prompt.stem, error)
        note.parent.mkdir(exist_ok=True)
        note.write_text(traceback.format_exc(), encoding="utf-8")


class Sampler:
    """Models of one process, loaded once for each dtype that the methods want.

    Args:
        plan: what to make.
        device: where.
        methods: those that will be asked for.

    Raises:
        UserError: a model cannot be loaded with the settings.
    """

    def __init__(self, plan: Plan, device: torch.device, methods: list[Method]) -> None:
        self.plan, self.device = plan, device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.subjects: dict[torch.dtype, Subject] = {}
        for dtype in {self._dtype(method): None for method in methods}:
            options = {**plan.experiment.changes, "device": str(device)}
            self.subjects[dtype] = load_subject(plan.experiment.config, dtype_name(dtype), options)
        self._warm: set[str] = set()

    @cached_property
    def _origin(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else str(self.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "commit": git_commit(),
            "run": uuid.uuid4().hex,  # times compare within one run of one process
        }

    def make(self, method: Method, prompt: Prompt, generators: dict[torch.dtype, Generator]) -> None:
        """Make one sample and write it.

        Args:
            method, prompt: of the sample; `exact` before the others of a prompt.
            generators: of the prompt, by dtype; what is missing is added.
        """
        dtype = self._dtype(method)
        if dtype not in generators:
            generators[dtype] = self.subjects[dtype].generator(prompt.text, prompt.seed)
        generator = generators[dtype]
        if method.name not in self._warm:
            _run_one_iteration(generator, method.cache)
            self._warm.add(method.name)
        if method.cache is None:
            frames, trace, taken = self._stock(generator, prompt)
        else:
            made = sample(generator, method.cache)
            frames, trace = made.frames, made.trace
            taken = {
                "seconds": made.seconds,
                "flops": made.flops,
                "tokens_computed": made.tokens_computed,
                "tokens_total": made.tokens_total,
                "peak_bytes": made.trace.peak_bytes,
            }
        config = planned_config(self.plan.experiment, method, prompt)
        facts = {
            "fingerprint": self.plan.fingerprint(method, prompt),
            "model": Path(config["model"]).name,
            "method": method.name,
            "preset": method.preset,
            "prompt": prompt.text,
            "index": prompt.index,
            "seed": prompt.seed,
            **taken,
            "dtype": dtype_name(dtype),
            **self._origin,
            "config": config,
        }
        self.plan.folder.write(method.name, prompt.stem, frames, config["fps"], trace, facts)

    def _dtype(self, method: Method) -> torch.dtype:
        return resolve_dtype(method.dtype or self.plan.experiment.settings.dtype, self.device)

    def _stock(self, generator: Generator, prompt: Prompt) -> tuple[np.ndarray, Trace | None, dict[str, Any]]:
        """The unmodified pipeline, whole. Nothing records what it decides: it decides nothing."""
        exact = self.plan.folder.summary(EXACT, prompt.stem)
        if exact is None or not self.plan.is_finished(self.plan.experiment.methods[EXACT], prompt):
            raise RuntimeError("the exact sample of this prompt was not made, and its tokens are what shares refer to")
        denoised = generator.run()
        taken = {
            "seconds": denoised.seconds,
            "flops": generator.stock.flops,
            "tokens_computed": generator.stock.tokens,
            "tokens_total": exact["tokens_total"],
            "peak_bytes": {},
        }
        return generator.decode(denoised.latents), None, taken


def _run_one_iteration(generator: Generator, cache: MotionCacheConfig | None) -> None:
    """Pay for what is set up at first use, before anything is timed."""
    if cache is None:
        generator.run(stop_after=1)
        return
    generator.attach(cache, keep_maps=False)
    try:
        generator.run(stop_after=1)
    finally:
        generator.detach()
