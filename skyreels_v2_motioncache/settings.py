"""Settings of a run with SkyReels-V2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common import settings
from common.checks import check_range


@dataclass(frozen=True)
class RunSettings(settings.RunSettings):
    """One video to make. Names are those of the stock pipeline's arguments where there is one.

    Args:
        model: folder in the diffusers layout, or the name of a repository on the Hugging Face hub.
        image: file that the video starts with. It needs `addnoise_condition` above 0 when chunks hold several frames.
        overlap_history: frames that a window takes over from the one before; null for a single window.
        num_frames: of the whole video, 4k + 1.
        negative_prompt: what to keep away from.
        base_num_frames: frames of one window; a longer video is made window after window.
        addnoise_condition: noise put on given frames, in timesteps of 1000.
        guidance_scale: classifier-free guidance; 1 turns it off.
        shift: flow shift of the noise levels; null keeps the checkpoint's.
        sigmas: `original` spaces noise levels as the SkyReels-V2 repository does, `diffusers` as the library does.
        ar_step: iterations by which a chunk starts after the one before; 0 denoises all frames together.
        causal_block_size: latent frames of a chunk.
        max_sequence_length: tokens that prompts are padded or cut to.
        fps: frames per second of the file; models with an fps embedding are told of it.
        stock: how much of the unmodified pipeline a comparison runs: `full`, a number of iterations from which the
            time is scaled up, or `none`.
        prefix_noise: `frozen` draws the noise on given frames once, `fresh` at each iteration as the stock pipeline.

    Raises:
        UserError: a setting has the wrong type or is outside its range.
    """

    height: int = 544
    width: int = 960
    num_frames: int = 97
    steps: int = 50
    fps: int = 24
    negative_prompt: str = ""
    base_num_frames: int = 97
    addnoise_condition: float = 0
    guidance_scale: float = 6.0
    shift: float | None = None
    sigmas: Literal["original", "diffusers"] = "original"
    ar_step: int = 5
    causal_block_size: int = 5
    max_sequence_length: int = 512
    stock: Literal["full", "none"] | int = "full"
    prefix_noise: Literal["frozen", "fresh"] = "frozen"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("base_num_frames", "causal_block_size", "max_sequence_length"):
            check_range(name, getattr(self, name), 1)
        check_range("addnoise_condition", self.addnoise_condition, 0, 999)
        check_range("guidance_scale", self.guidance_scale, 0)
        check_range("ar_step", self.ar_step, 0)
        if self.shift is not None:
            check_range("shift", self.shift, 0.01)
        if isinstance(self.stock, int):
            check_range("stock", self.stock, 2)

    @property
    def guided(self) -> bool:
        """Whether there is a second, unconditional branch."""
        return self.guidance_scale > 1


FILES = settings.SettingsFiles(RunSettings, "skyreels_v2")
load_settings = FILES.load
