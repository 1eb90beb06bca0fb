"""A loaded model that makes many videos: what every benchmark of quality works on, whichever model it is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cache import MotionCacheConfig, Trace
from common.cache.policy import Policy
from common.devices import check_offload, resolve_device, resolve_dtype
from common.errors import UserError
from common.files import read_yaml
from common.generator import Generator
from common.settings import RunSettings, SettingsFiles
from magi1_motioncache import generate as magi_generate
from magi1_motioncache import loading as magi_loading
from magi1_motioncache import validate as magi_validate
from magi1_motioncache.folders import find_checkpoint as find_magi
from magi1_motioncache.folders import inspect_checkpoint as inspect_magi
from magi1_motioncache.settings import FILES as MAGI_FILES
from skyreels_v2_motioncache import generate as skyreels_generate
from skyreels_v2_motioncache import loading as skyreels_loading
from skyreels_v2_motioncache import validate as skyreels_validate
from skyreels_v2_motioncache.checkpoint import find_checkpoint as find_skyreels
from skyreels_v2_motioncache.checkpoint import inspect_checkpoint as inspect_skyreels
from skyreels_v2_motioncache.settings import FILES as SKYREELS_FILES

EXACT = MotionCacheConfig.preset("exact")


@dataclass(frozen=True)
class Sample:
    """One video and what making it took.

    Attributes:
        frames: `[frames, height, width, 3]` floats in [0, 1]; None if they were not asked for.
        seconds: denoising time.
        flops: matrix products computed, a multiply-add counting 2.
        tokens_computed: token computations, those of all guidance passes.
        tokens_total: those of exact execution.
        trace: all decisions.
    """

    frames: np.ndarray | None
    seconds: float
    flops: float
    tokens_computed: int
    tokens_total: int
    trace: Trace

    @property
    def share(self) -> float:
        """Share of exact's token computations."""
        return self.tokens_computed / self.tokens_total


class Subject(ABC):
    """A model on its device, for text-to-video with one config's settings.

    Args:
        settings: of all its videos; prompt and seed change from one to the next.
        dtype: instead of the settings' own.

    Raises:
        UserError: the checkpoint or a size is wrong, or blocks are to be compiled.
    """

    folder: Path
    """The checkpoint."""

    def __init__(self, settings: RunSettings, dtype: str | None = None) -> None:
        self.settings = settings if dtype is None else dataclasses.replace(settings, dtype=dtype)
        self.device = resolve_device(self.settings.device)
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        check_offload(self.settings.offload, self.device)
        if self.settings.compile:
            raise UserError("compile: true is not for benchmarks, which make all videos alike; use compile=false")
        self._load()

    @staticmethod
    @abstractmethod
    def find(model: str) -> Path:
        """The checkpoint's folder, fetched if it is on the hub."""

    @abstractmethod
    def _load(self) -> None:
        """Check the settings, find the checkpoint and load it."""

    @abstractmethod
    def generator(self, prompt: str, seed: int) -> Generator:
        """One video's inputs, with the prompt encoded."""

    def sample(
        self, prompt: str, seed: int, config: MotionCacheConfig, policy: Policy | None = None, decode: bool = True
    ) -> Sample:
        """Make a video.

        Args:
            prompt: what to show.
            seed: of the noise.
            config: how to cache.
            policy: decides in place of the config's own, for instance a recorder that computes everything.
            decode: whether frames are wanted.
        """
        return sample(self.generator(prompt, seed), config, policy, decode)


def sample(
    generator: Generator, config: MotionCacheConfig, policy: Policy | None = None, decode: bool = True
) -> Sample:
    """Make a generator's video in one way (see `Subject.sample`)."""
    handle = generator.attach(config, keep_maps=False, policy=policy)
    try:
        denoised = generator.run()
        trace = handle.trace
        trace.finish()
    finally:
        generator.detach()
    totals = trace.totals()
    return Sample(
        generator.decode(denoised.latents) if decode else None,
        denoised.seconds,
        generator.trace_flops(trace),
        totals["tokens_computed"],
        totals["tokens_total"],
        trace,
    )


class SkyReelsSubject(Subject):
    """SkyReels-V2 in diffusers' own pipeline."""

    find = staticmethod(find_skyreels)

    def _load(self) -> None:
        s = self.settings
        self.folder = self.find(s.model)
        self.windows = skyreels_validate.check_shapes(s, inspect_skyreels(self.folder))
        self.pipe = skyreels_loading.load_pipeline(self.folder, "text", self.dtype, s.shift, s.sigmas)
        skyreels_loading.place_pipeline(self.pipe, self.device, s.offload)
        self.pipe.set_progress_bar_config(disable=True)

    def generator(self, prompt: str, seed: int) -> skyreels_generate.Generator:
        settings = dataclasses.replace(self.settings, prompt=prompt, seed=seed)
        generator = skyreels_generate.Generator(self.pipe, settings, self.windows)
        generator.encode()
        return generator


class Magi1Subject(Subject):
    """MAGI-1."""

    find = staticmethod(find_magi)

    def _load(self) -> None:
        s = self.settings
        self.folder = self.find(s.model)
        architecture = inspect_magi(self.folder, s.special_tokens_file)
        self.sampling = magi_validate.check_shapes(s, architecture)
        self.tokens = magi_validate.token_options(s, architecture.has_tokens)
        self.pipe = magi_loading.load_pipeline(self.folder, self.dtype, s.special_tokens_file)
        magi_loading.place_pipeline(self.pipe, self.device, s.offload)
        self.pipe.set_progress_bar_config(disable=True)

    def generator(self, prompt: str, seed: int) -> magi_generate.Generator:
        settings = dataclasses.replace(self.settings, prompt=prompt, seed=seed)
        generator = magi_generate.Generator(self.pipe, settings, self.sampling, self.tokens)
        generator.encode()
        return generator


FAMILIES: dict[str, tuple[SettingsFiles, type[Subject]]] = {
    "SkyReels-V2": (SKYREELS_FILES, SkyReelsSubject),
    "MAGI-1": (MAGI_FILES, Magi1Subject),
}


def family_of_settings(names: Iterable[str]) -> str | None:
    """Which model settings of these names are for; None if they fit none."""
    for name, (files, _) in FAMILIES.items():
        if set(names) <= {field.name for field in dataclasses.fields(files.settings)}:
            return name
    return None


def family_of(config: Path) -> str:
    """Which model a config is for, by the settings that it holds.

    Raises:
        UserError: it fits none.
    """
    family = family_of_settings(set(read_yaml(config)) - {"variants"})
    if family is not None:
        return family
    raise UserError(
        f"config {str(config)!r} has settings of neither {' nor '.join(FAMILIES)}; begin with a copy of one in configs/"
    )


def load_settings(config: Path, preset: str | None = None, options: dict[str, Any] | None = None) -> RunSettings:
    """Settings of a config of either model, with a preset and options on top (see `SettingsFiles.load`)."""
    return FAMILIES[family_of(config)][0].load(config, preset, options=options)[0]


def load_subject(config: Path, dtype: str | None = None, options: dict[str, Any] | None = None) -> Subject:
    """Load a config's model, with options on top of the config's settings.

    Raises:
        UserError: a setting or the checkpoint is wrong.
    """
    return FAMILIES[family_of(config)][1](load_settings(config, options=options), dtype)


def one_thread() -> None:
    """Leave the other cores to the other processes: they make other videos."""
    torch.set_num_threads(1)
