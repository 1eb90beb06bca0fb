"""How a video is sampled: schedule, window, key ranges, guidance. Data with validation, no behaviour."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from common.checks import check_range
from common.errors import UserError

SHORTCUT_STEPS = 12  # the one step count with its own, uneven schedule
SHORTCUT_MODES = ("8,16,16", "16,16,8")
PREFIX_FRAMES = 32  # frames of a given video that the models were made to continue


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling options, under the names of the published configurations.

    Attributes:
        num_steps: updates of every chunk.
        window_size: chunks denoised at the same time at most; divides `num_steps`.
        chunk_width: latent frames per chunk.
        noise2clean_kvrange: chunks (itself included) a chunk attends to, for equal shares of its steps from noise to
            clean; the number of entries divides `num_steps`. Empty: all earlier chunks.
        clean_chunk_kvrange: the same for a finished chunk's clean pass; -1 takes the last entry of
            `noise2clean_kvrange`.
        clean_t: time at which finished and prefix chunks are run.
        cfg_number: 1 for one pass (distilled models), 3 for three-way guidance (base models).
        cfg_t_range: lower ends of the time ranges that `prev_chunk_scales` and `text_scales` belong to; 0 is noise, 1
            clean.
        prev_chunk_scales: guidance scale of the earlier chunks per range.
        text_scales: guidance scale of the text per range.
        distill: feed the step size to the model.
        shortcut_mode: uneven schedule used with 12 steps.
        nearly_clean_threshold: time above which the oldest chunk is also run without history (one-pass guidance).
        nearly_clean_scale: weight of the run with history then; the one without gets the rest.
        fps: frames per second of the video.
        temporal_downsample_factor: frames per latent frame.
        scale_factor: latents are posterior means times this.

    Raises:
        UserError: values that do not fit together.
    """

    num_steps: int = 64
    window_size: int = 4
    chunk_width: int = 6
    noise2clean_kvrange: tuple[int, ...] = (5, 4, 3, 2)
    clean_chunk_kvrange: int = 1
    clean_t: float = 0.9999
    cfg_number: int = 1
    cfg_t_range: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_chunk_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    distill: bool = True
    shortcut_mode: str = "8,16,16"
    nearly_clean_threshold: float = 0.3
    nearly_clean_scale: float = 0.7
    fps: int = 24
    temporal_downsample_factor: int = 4
    scale_factor: float = 0.18215

    def __post_init__(self) -> None:
        for name in ("noise2clean_kvrange", "cfg_t_range", "prev_chunk_scales", "text_scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("num_steps", "window_size", "chunk_width", "fps", "temporal_downsample_factor"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_steps()
        self._check_ranges()
        self._check_guidance()

    @property
    def steps_per_stage(self) -> int:
        """Updates of a chunk between two moves of the window."""
        return self.num_steps // self.window_size

    def replace(self, **changes: Any) -> SamplingConfig:
        """A copy with some options changed, checked again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingConfig:
        """From plain values.

        Raises:
            UserError: a name that is no option.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"unknown sampling option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def _check_steps(self) -> None:
        if self.num_steps % self.window_size:
            raise UserError(
                f"num_steps {self.num_steps} is not divisible by window_size {self.window_size}: no chunk would be "
                f"finished; choose a multiple"
            )
        if self.shortcut_mode not in SHORTCUT_MODES:
            raise UserError(
                f"shortcut_mode {self.shortcut_mode!r} is not one of {', '.join(map(repr, SHORTCUT_MODES))}"
            )
        if self.distill and self.num_steps == SHORTCUT_STEPS and self.steps_per_stage % 3:
            raise UserError(
                f"window_size {self.window_size} splits the {SHORTCUT_STEPS} steps inside a group of three; "
                f"use 1, 2 or 4"
            )

    def _check_ranges(self) -> None:
        ranges = self.noise2clean_kvrange
        if ranges and self.num_steps % len(ranges):
            raise UserError(
                f"noise2clean_kvrange has {len(ranges)} entries, which does not divide num_steps {self.num_steps}"
            )
        if any(width < 1 for width in ranges):
            raise UserError(
                f"noise2clean_kvrange {list(ranges)}: a chunk always attends to itself, so entries start at 1"
            )
        if self.clean_chunk_kvrange < 1 and self.clean_chunk_kvrange != -1:
            raise UserError(f"clean_chunk_kvrange {self.clean_chunk_kvrange} is neither -1 nor at least 1")
        check_range("clean_t", self.clean_t, 0, 1)

    def _check_guidance(self) -> None:
        if self.cfg_number not in (1, 3):
            raise UserError(f"cfg_number {self.cfg_number} is neither 1 (distilled) nor 3 (base)")
        lengths = {len(self.cfg_t_range), len(self.prev_chunk_scales), len(self.text_scales)}
        if len(lengths) != 1 or not self.cfg_t_range:
            raise UserError("cfg_t_range, prev_chunk_scales and text_scales must have the same number of entries")
        rises = all(low <= high for low, high in pairwise((*self.cfg_t_range, 1)))
        if self.cfg_t_range[0] != 0 or not rises:
            raise UserError(f"cfg_t_range {list(self.cfg_t_range)} must start at 0 and rise, to 1 at most")
        for name in ("prev_chunk_scales", "text_scales"):
            if not all(map(math.isfinite, getattr(self, name))):
                raise UserError(f"{name} {list(getattr(self, name))} must be finite numbers")
        if not math.isfinite(self.nearly_clean_threshold):
            raise UserError(f"nearly_clean_threshold {self.nearly_clean_threshold} must be a finite number")
        check_range("nearly_clean_scale", self.nearly_clean_scale, 0, 1)
