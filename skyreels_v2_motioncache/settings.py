"""All settings of one run: a YAML file, changed by the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from common.cache import MotionCacheConfig
from common.checks import check_keys, check_range, check_type, near_miss
from common.errors import UserError
from common.files import read_yaml
from common.runs import REPOSITORY
from skyreels_v2_motioncache.windows import Kind

CONFIGS = REPOSITORY / "configs"
PRESETS = ("exact", "slow", "fast", "flowcache-slow", "flowcache-fast")
DEFAULT_FAMILY = "tiny"


@dataclass(frozen=True)
class RunSettings:
    """One video to make. Names are those of the stock pipeline's arguments where there is one.

    Args:
        model: folder in the diffusers layout, or the name of a repository on the Hugging Face hub.
        prompt, negative_prompt: what to show, and what to keep away from.
        image: file that the video starts with. It needs `addnoise_condition` above 0 when chunks hold several frames.
        video: file that the video continues from its last `overlap_history` frames.
        height, width: of the video, in pixels.
        num_frames: of the whole video, 4k + 1.
        base_num_frames: frames of one window; a longer video is made window after window.
        overlap_history: frames that a window takes over from the one before; null for a single window.
        addnoise_condition: noise put on given frames, in timesteps of 1000.
        steps: denoising steps of each chunk.
        guidance_scale: classifier-free guidance; 1 turns it off.
        shift: flow shift of the noise levels; null keeps the checkpoint's.
        sigmas: `original` spaces noise levels as the SkyReels-V2 repository does, `diffusers` as the library does.
        ar_step: iterations by which a chunk starts after the one before; 0 denoises all frames together.
        causal_block_size: latent frames of a chunk.
        max_sequence_length: tokens that prompts are padded or cut to.
        fps: frames per second of the file; models with an fps embedding are told of it.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        device: `auto` is CUDA where there is one, else the CPU.
        dtype: `auto` is bfloat16 on CUDA and float32 on a CPU. The VAE stays in float32.
        offload: `model` keeps on the GPU only the part that is at work, `group` only the layers that are.
        stock: how much of the unmodified pipeline a comparison runs: `full`, a number of iterations from which the
            time is scaled up, or `none`.
        prefix_noise: `frozen` draws the noise on given frames once, `fresh` at each iteration as the stock pipeline.
        cache: what is cached.

    Raises:
        UserError: a setting has the wrong type or is outside its range.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    image: str | None = None
    video: str | None = None
    height: int = 544
    width: int = 960
    num_frames: int = 97
    base_num_frames: int = 97
    overlap_history: int | None = None
    addnoise_condition: float = 0
    steps: int = 50
    guidance_scale: float = 6.0
    shift: float | None = None
    sigmas: Literal["original", "diffusers"] = "original"
    ar_step: int = 5
    causal_block_size: int = 5
    max_sequence_length: int = 512
    fps: int = 24
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    offload: Literal["none", "model", "group"] = "none"
    stock: Literal["full", "none"] | int = "full"
    prefix_noise: Literal["frozen", "fresh"] = "frozen"
    cache: MotionCacheConfig = field(default_factory=MotionCacheConfig)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if name != "cache":
                check_type(name, getattr(self, name), hint)
        for name in ("height", "width", "num_frames", "base_num_frames", "steps", "causal_block_size", "fps"):
            check_range(name, getattr(self, name), 1)
        check_range("max_sequence_length", self.max_sequence_length, 1)
        check_range("addnoise_condition", self.addnoise_condition, 0, 999)
        check_range("guidance_scale", self.guidance_scale, 0)
        check_range("ar_step", self.ar_step, 0)
        check_range("seed", self.seed, 0)
        if self.shift is not None:
            check_range("shift", self.shift, 0.01)
        if isinstance(self.stock, int):
            check_range("stock", self.stock, 2)
        if self.image is not None and self.video is not None:
            raise UserError("image and video are both given; a video starts with one of them, leave the other out")

    @property
    def kind(self) -> Kind:
        """What the video is made from besides the prompt."""
        return "image" if self.image is not None else "video" if self.video is not None else "text"

    @property
    def guided(self) -> bool:
        """Whether there is a second, unconditional branch."""
        return self.guidance_scale > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, in the form of the YAML file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "cache": self.cache.to_dict()}


def load_settings(
    config: Path | None = None,
    preset: str | None = None,
    model: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[RunSettings, Path]:
    """Settings of a run, from a file and what was said on top of it.

    Args:
        config: YAML file. Without one, the shipped file for `model` and `preset`.
        preset: one of `PRESETS`. It takes the cache settings of the config's sibling of that name, so that
            `skyreels_v2_14b_540p_slow.yaml` with `fast` uses those of `skyreels_v2_14b_540p_fast.yaml`.
        model: folder or hub name; replaces the file's.
        options: further settings by name; those of the cache as `cache.<name>`.

    Returns:
        The settings and the file that they came from.

    Raises:
        UserError: a file, key, value or preset is wrong; the line says which and what is allowed.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; {near_miss(preset, PRESETS)}")
    if config is None:
        config = CONFIGS / f"{_family_of(model)}_{_stem(preset or 'slow')}.yaml"
    values = read_yaml(config)
    if preset is not None:
        values["cache"] = _preset_cache(config, preset)
    if model is not None:
        values["model"] = model
    for key, value in (options or {}).items():
        if key.startswith("cache."):
            values["cache"] = {**(values.get("cache") or {}), key.removeprefix("cache."): value}
        else:
            values[key] = value
    return from_dict(values), config


def from_dict(values: dict[str, Any]) -> RunSettings:
    """Settings from a YAML mapping.

    Raises:
        UserError: a key is unknown, `model` or `prompt` is missing, or a value is not allowed.
    """
    check_keys("setting", values, [f.name for f in dataclasses.fields(RunSettings)])
    for name in ("model", "prompt"):
        if name not in values:
            raise UserError(f"the config names no {name}; add a line '{name}: ...' or give --{name}")
    cache = values.get("cache") or {}
    if not isinstance(cache, dict):
        raise UserError(f"cache: {cache!r} is not allowed; give lines of 'key: value' under it")
    return RunSettings(**{**values, "cache": MotionCacheConfig.from_dict(cache)})


def method_name(settings: RunSettings, config: Path, preset: str | None, options: dict[str, Any]) -> str:
    """A short name for files and tables: `exact`, `motioncache-slow`, or the cache's tag if it was changed by hand.

    Args:
        settings, config: as `load_settings` returned them for `preset` and `options`.
    """
    if settings.cache.method == "exact":
        return "exact"
    own = preset or config.stem.rpartition("_")[2]
    if own not in PRESETS or any(key.startswith("cache.") for key in options):
        return settings.cache.tag
    return own if own.startswith("flowcache-") else f"motioncache-{own}"


def _stem(preset: str) -> str:
    """The file that holds a preset: chunk-level presets are the token-level ones with α = 1."""
    return preset.removeprefix("flowcache-")


def _preset_cache(config: Path, preset: str) -> dict[str, Any]:
    family, _, own = config.stem.rpartition("_")
    sibling = config.with_name(f"{family}_{_stem(preset)}.yaml")
    if own not in ("exact", "slow", "fast") or not sibling.is_file():
        raise UserError(
            f"preset {preset!r} is not defined for config {str(config)!r}: there is no {sibling.name!r} beside it; "
            "use --set cache.KEY=VALUE, or a file of configs/"
        )
    cache = dict(read_yaml(sibling).get("cache") or {})
    if preset.startswith("flowcache-"):
        cache["alpha"] = 1.0
    return cache


def _family_of(model: str | None) -> str:
    """The family of shipped configs for a model, by the last part of its name; the tiny one for any other."""
    if model is not None:
        for path in sorted(CONFIGS.glob("*_slow.yaml")):
            if Path(str(read_yaml(path).get("model"))).name == Path(model).name:
                return path.stem.removesuffix("_slow")
    return DEFAULT_FAMILY
