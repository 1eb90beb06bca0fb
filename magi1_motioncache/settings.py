"""Settings of a run with MAGI-1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_type_hints

from common import settings
from common.checks import check_keys, check_range, check_type
from common.errors import UserError
from magi1_motioncache.config import PREFIX_FRAMES, SamplingConfig

SAMPLING = (
    "window_size",
    "noise2clean_kvrange",
    "clean_chunk_kvrange",
    "clean_t",
    "cfg_number",
    "cfg_t_range",
    "prev_chunk_scales",
    "text_scales",
    "shortcut_mode",
    "nearly_clean_threshold",
    "nearly_clean_scale",
)
"""Options of `SamplingConfig` that a run may change. The others are `steps` and `fps`, or belong to the checkpoint."""
MODES: dict[settings.Kind, str] = {"text": "t2v", "image": "i2v", "video": "v2v"}


@dataclass(frozen=True)
class RunSettings(settings.RunSettings):
    """One video to make.

    Args:
        model: folder that `Magi1Pipeline.from_pretrained` opens, or a published one, `ckpt/magi/<variant>`.
        mode: `t2v`, `i2v` or `v2v`; null infers it from `image` and `video`.
        overlap_history: frames of a given video that are taken over, at most 32.
        num_frames: of the whole video, in whole chunks.
        guidance_scale: strength of the text wherever `sampling.text_scales` is not 0; null keeps those.
        sampling: options of `SamplingConfig` (see `SAMPLING`); those left out are the checkpoint's.
        special_tokens: learned tokens in front of the caption, fields of `SpecialTokenOptions`; null takes quality and
            duration where the checkpoint has tokens.
        special_tokens_file: `special_tokens.npz` of the original code, for a checkpoint without them.

    Raises:
        UserError: a setting has the wrong type or is outside its range, or the mode contradicts the input.
    """

    overlap_history: int = PREFIX_FRAMES
    height: int = 720
    width: int = 720
    num_frames: int = 96
    steps: int = 64
    fps: int = 24
    mode: Literal["t2v", "i2v", "v2v"] | None = None
    guidance_scale: float | None = None
    special_tokens: tuple[str, ...] | None = None
    special_tokens_file: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    sections: ClassVar[dict[str, tuple[str, ...]]] = {**settings.RunSettings.sections, "sampling": SAMPLING}

    def __post_init__(self) -> None:
        if isinstance(self.special_tokens, str):
            raise UserError(f"special_tokens: {self.special_tokens!r} is not a list; give [{self.special_tokens}]")
        if isinstance(self.special_tokens, list):
            object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        super().__post_init__()
        check_range("overlap_history", self.overlap_history, 1, PREFIX_FRAMES)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0)
        self._check_sampling()
        self._check_mode()

    def _check_sampling(self) -> None:
        check_keys("sampling setting", self.sampling, SAMPLING)
        hints = get_type_hints(SamplingConfig)
        for name, value in self.sampling.items():
            check_type(f"sampling.{name}", tuple(value) if isinstance(value, list) else value, hints[name])

    def _check_mode(self) -> None:
        inferred = MODES[self.kind]
        if self.mode in (None, inferred):
            return
        needed = {"i2v": "image", "v2v": "video"}.get(self.mode)
        if needed is not None and getattr(self, needed) is None:
            raise UserError(f"mode: {self.mode!r} needs a given {needed}; add --{needed} FILE, or choose another mode")
        raise UserError(f"mode: {self.mode!r} contradicts the given {self.kind}; leave out one of them")


FILES = settings.SettingsFiles(RunSettings, "magi1")
load_settings = FILES.load
