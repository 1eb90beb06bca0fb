"""A folder of samples: what is in it, what is whole, and whether it is what an experiment asks for.

`OUT/<method>/<stem>.mp4` is for viewers and VBench, `.mkv` (lossless) for metrics, `.trace.json` holds the decisions,
and `.json`, written last, says what the others are. A sample is finished if that file has the fingerprint of what is
asked for and the others have the sizes that it names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import Experiment, Method, Prompt
from benchmarks.subject import FAMILIES, family_of
from common.cache import Trace
from common.devices import dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.files import write_json
from common.settings import RunSettings
from common.video import write_lossless, write_video
from magi1_motioncache.folders import AUTOENCODER, TEXT_ENCODER, published_name, published_root

VIDEO, LOSSLESS, TRACE, SUMMARY, SCORES, ERROR = ".mp4", ".mkv", ".trace.json", ".json", ".scores.json", ".error.txt"
CONTENTS = (VIDEO, LOSSLESS, TRACE)
BLOCK = 1 << 22


class SampleFolder:
    """The samples of one experiment.

    Args:
        root: `OUT`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, method: str, stem: str, suffix: str) -> Path:
        """Where a file of a sample is, or will be."""
        return self.root / method / (stem + suffix)

    def summary(self, method: str, stem: str) -> dict[str, Any] | None:
        """What is known of a sample; None unless it is whole."""
        summary = _read(self.file(method, stem, SUMMARY))
        if summary is None:
            return None
        for suffix, size in summary["files"].items():
            file = self.file(method, stem, suffix)
            if not file.is_file() or file.stat().st_size != size:
                return None
        return summary

    def scores(self, method: str, stem: str) -> dict[str, Any] | None:
        """What `benchmarks.score` wrote for a sample, if it did."""
        return _read(self.file(method, stem, SCORES))

    def stems(self, method: str) -> list[str]:
        """Names of a method's samples whose summaries are there."""
        names = (file.name for file in (self.root / method).glob("*" + SUMMARY) if not file.name.startswith("."))
        return sorted(n.removesuffix(SUMMARY) for n in names if not n.endswith((TRACE, SCORES)))

    def methods(self) -> list[str]:
        """Methods that have samples."""
        return sorted(folder.name for folder in self.root.iterdir() if folder.is_dir() and self.stems(folder.name))

    def write(
        self, method: str, stem: str, frames: np.ndarray, fps: int, trace: Trace | None, facts: dict[str, Any]
    ) -> None:
        """Write a sample, its summary last, so that a summary stands for a whole sample.

        Args:
            method, stem: of the sample.
            frames: `[frames, height, width, 3]`, uint8 or floats in [0, 1].
            fps: frames per second.
            trace: its decisions; None if nothing recorded them.
            facts: for the summary, `fingerprint` among them.
        """
        summary = self.file(method, stem, SUMMARY)
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)
        for leftover in _partials(summary.parent, stem):
            leftover.unlink(missing_ok=True)
        write_video(self.file(method, stem, VIDEO), frames, fps)
        write_lossless(self.file(method, stem, LOSSLESS), frames, fps)
        if trace is not None:
            write_json(self.file(method, stem, TRACE), trace.to_dict(), indent=None)
        files = {s: self.file(method, stem, s) for s in CONTENTS}
        sizes = {s: file.stat().st_size for s, file in files.items() if s != TRACE or trace is not None}
        write_json(summary, {**facts, "files": sizes})
        self.file(method, stem, ERROR).unlink(missing_ok=True)


def planned_config(experiment: Experiment, method: Method, prompt: Prompt) -> dict[str, Any]:
    """The full settings of a sample; `cache` is None for the unmodified pipeline."""
    settings = dataclasses.replace(
        experiment.settings, prompt=prompt.text, seed=prompt.seed, dtype=method.dtype or experiment.settings.dtype
    )
    return {**settings.to_dict(), "cache": None if method.cache is None else method.cache.to_dict()}


def sample_fingerprint(config: dict[str, Any], weights: str) -> str:
    """What a sample depends on, as one word.

    Args:
        config: of `planned_config`. Where the checkpoint lies makes no difference; the device's kind and what `auto`
            means on it do.
        weights: of `weights_digest`.
    """
    device = resolve_device(config["device"])
    dtype = dtype_name(resolve_dtype(config["dtype"], device))
    content = {**config, "model": weights, "device": device.type, "dtype": dtype}
    content.pop("compile", None)  # always false here; samples from before there was the setting are still the same
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def find_checkpoint(config: Path, settings: RunSettings) -> Path:
    """The folder of an experiment's model.

    Raises:
        UserError: there is none.
    """
    return FAMILIES[family_of(config)][1].find(settings.model)


def weights_digest(checkpoint: Path) -> str:
    """All of a checkpoint's content as one word: weights, configurations and tokenizer."""
    parts = [checkpoint]
    if published_name(checkpoint) is not None:  # the published layout keeps them beside the transformer
        parts += [published_root(checkpoint) / part for part in (AUTOENCODER, TEXT_ENCODER)]
    digest = hashlib.sha256()
    for part in parts:
        for name in sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file()):
            if name.suffix == ".md" or any(folder.startswith(".") for folder in name.parts):
                continue  # words, and what download tools note down
            file = part / name
            digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def open_samples(root: Path) -> SampleFolder:
    """A folder that has samples in it.

    Raises:
        UserError: it is missing, or nothing is in it.
    """
    folder = SampleFolder(root)
    if not root.is_dir() or not folder.methods():
        raise UserError(
            f"{str(root)!r} holds no samples; make some: python -m benchmarks.sample EXPERIMENT --output DIR"
        )
    return folder


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _partials(folder: Path, stem: str) -> Iterator[Path]:
    """Files that were being written when a run ended."""
    for file in folder.glob(".partial-*"):
        name = file.name.removeprefix(".partial-").partition("-")[2]
        if name in {stem + suffix for suffix in (*CONTENTS, SUMMARY)}:
            yield file
