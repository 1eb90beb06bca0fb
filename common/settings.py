"""All settings of one run: a YAML file, changed by the command line."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_type_hints

from common.cache import MotionCacheConfig
from common.checks import check_keys, check_range, check_type, near_miss
from common.errors import UserError
from common.files import read_yaml
from common.runs import REPOSITORY

CONFIGS = REPOSITORY / "configs"
PAPERS = ("slow", "fast")
"""The papers' settings of a method; other methods have them too."""
STEMS = ("exact", *PAPERS, "best")
DEFAULT_SIZE = "tiny"
VARIANTS: dict[str, dict[str, Any]] = {"flowcache": {"alpha": 1.0}, "teacache": {"method": "teacache"}}
"""What other methods change in a file's cache settings, unless its `variants` say otherwise."""
WITHOUT_EFFECT = ("cache.state_device",)
"""Cache settings that say where something is, and change nothing in a video."""
LARGEST_SEED = 2**64 - 1
"""What PyTorch's generators take."""
PRESETS = (*STEMS, *(f"{variant}-{stem}" for variant in VARIANTS for stem in PAPERS))
Kind = Literal["text", "image", "video"]
"""What a video is made from besides the prompt."""


@dataclass(frozen=True)
class RunSettings:
    """One video to make: what all models' settings have in common.

    Args:
        model: folder in the diffusers layout, or another name that the model's package understands.
        prompt: what to show.
        image: file that the video starts with.
        video: file that the video continues from its last `overlap_history` frames, taken at `fps` frames per second.
        overlap_history: frames that are taken over from what came before; null for none.
        height, width: of the video, in pixels.
        num_frames: of the whole video, those taken over from a given one included.
        steps: denoising steps of each chunk.
        fps: frames per second of the file.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        device: `auto` is CUDA where there is one, else the CPU.
        dtype: `auto` is bfloat16 on CUDA and float32 on a CPU. The VAE stays in float32.
        offload: `model` keeps on the GPU only the part that is at work, `group` only the layers that are.
        compile: whether the transformer's blocks go through `torch.compile`, in every stage of a comparison. It is not
            combined with `offload: group`.
        cache: what is cached.

    Raises:
        UserError: a setting has the wrong type or is outside its range.
    """

    model: str
    prompt: str
    image: str | None = None
    video: str | None = None
    overlap_history: int | None = None
    height: int = field(kw_only=True)
    width: int = field(kw_only=True)
    num_frames: int = field(kw_only=True)
    steps: int = field(kw_only=True)
    fps: int = field(kw_only=True)
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    offload: Literal["none", "model", "group"] = "none"
    compile: bool = False
    cache: MotionCacheConfig = field(default_factory=MotionCacheConfig)

    sections: ClassVar[dict[str, tuple[str, ...]]] = {
        "cache": tuple(f.name for f in dataclasses.fields(MotionCacheConfig))
    }
    """Settings that are mappings of their own, `section.key` on the command line, and the keys of each."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if name not in ("sections", *self.sections):
                check_type(name, getattr(self, name), hint)
        for name in ("height", "width", "num_frames", "steps", "fps"):
            check_range(name, getattr(self, name), 1)
        check_range("seed", self.seed, 0, LARGEST_SEED)
        if self.image is not None and self.video is not None:
            raise UserError("image and video are both given; a video starts with one of them, leave the other out")
        if self.compile and self.offload == "group":
            raise UserError(
                "compile: true is not combined with offload: 'group', which moves weights between blocks; "
                "use --set compile=false or offload=none"
            )

    @property
    def kind(self) -> Kind:
        """What the video is made from besides the prompt."""
        return "image" if self.image is not None else "video" if self.video is not None else "text"

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, in the form of the YAML file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**plain, "cache": self.cache.to_dict()}

    @classmethod
    def from_dict(cls: type[S], values: dict[str, Any]) -> S:
        """Settings from a YAML mapping.

        Raises:
            UserError: a key is unknown, `model` or `prompt` is missing, or a value is not allowed.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            section = next((section for section, names in cls.sections.items() if name in names), None)
            if name not in known and section is not None:
                raise UserError(f"unknown setting {name!r}; did you mean '{section}.{name}'?")
        check_keys("setting", values, known)
        for name in ("model", "prompt"):
            if name not in values:
                raise UserError(f"the config names no {name}; add a line '{name}: ...' or give --{name}")
        sections = {name: values.get(name) or {} for name in cls.sections}
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise UserError(f"{name}: {section!r} is not allowed; give lines of 'key: value' under it")
        return cls(**{**values, **sections, "cache": MotionCacheConfig.from_dict(sections["cache"])})


S = TypeVar("S", bound=RunSettings)


@dataclass(frozen=True)
class SettingsFiles(Generic[S]):
    """The shipped YAML files of a model: `<family>_<size>_<preset>.yaml`, of which size `tiny` is the default.

    Args:
        settings: class of the settings.
        family: what the names of the model's files begin with.
    """

    settings: type[S]
    family: str

    def load(
        self,
        config: Path | None = None,
        preset: str | None = None,
        model: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[S, Path]:
        """Settings of a run, from a file and what was said on top of it.

        Args:
            config: YAML file, or a run's `summary.json`, whose `config` it then is. Without one, the shipped file for
                `model` and `preset`.
            preset: one of `PRESETS`. It takes the cache settings of the config's sibling of that name, so that
                `skyreels_v2_14b_540p_slow.yaml` with `fast` uses those of `skyreels_v2_14b_540p_fast.yaml`. For
                `flowcache-fast` these are changed as its `variants` say.
            model: replaces the file's.
            options: further settings by name; those of a section as `cache.<name>`.

        Returns:
            The settings and the file that they came from.

        Raises:
            UserError: a file, key, value or preset is wrong; the line says which and what is allowed.
        """
        if preset is not None and preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; {near_miss(preset, PRESETS)}")
        if config is None:
            config = CONFIGS / f"{self._size_of(model)}_{_stem(preset or 'slow')}.yaml"
        values = read_yaml(config)
        if {"config", "stages"} <= values.keys():
            values = values["config"]
        values.pop("variants", None)
        if preset is not None:
            values["cache"] = _preset_cache(config, preset)
        if model is not None:
            values["model"] = model
        for key, value in (options or {}).items():
            section, dot, name = key.partition(".")
            if dot and section in self.settings.sections:
                values[section] = {**(values.get(section) or {}), name: value}
            else:
                values[key] = value
        return self.settings.from_dict(values), config

    def _size_of(self, model: str | None) -> str:
        """Family and size of the shipped files for a model, by the last part of its name; tiny for any other.

        The name is that of the files' own model, or a size: `4.5B_distill`.
        """
        if model is not None:
            name = Path(model).name
            for path in sorted(CONFIGS.glob(f"{self.family}_*_slow.yaml")):
                size = path.stem.removesuffix("_slow")
                if Path(str(read_yaml(path).get("model"))).name == name or size == f"{self.family}_{name.lower()}":
                    return size
        return f"{self.family}_{DEFAULT_SIZE}"

    def is_default(self, config: Path) -> bool:
        """Whether a file is one of those that `load` takes for a model that it has no files for."""
        return config.resolve().parent == CONFIGS and config.stem.startswith(f"{self.family}_{DEFAULT_SIZE}_")

    def nearest(self, name: str) -> Path:
        """The shipped file whose size reads most like `name`, of preset slow."""
        sizes = {path.stem.removesuffix("_slow"): path for path in CONFIGS.glob(f"{self.family}_*_slow.yaml")}
        return sizes[difflib.get_close_matches(f"{self.family}_{name.lower()}", sizes, n=1, cutoff=0)[0]]


def check_overlap(settings: RunSettings, given: int, shortest: int) -> None:
    """Check that a given video is long enough to continue.

    Args:
        settings: of the run.
        given: frames of the video, at the settings' rate.
        shortest: smallest overlap that the model can do with.

    Raises:
        UserError: it has fewer frames than `overlap_history`.
    """
    if given >= settings.overlap_history:
        return
    shorter = f", or --set overlap_history={shortest}" if shortest <= given else ""
    raise UserError(
        f"video {settings.video!r} has {given} frames at {settings.fps} per second, fewer than the "
        f"{settings.overlap_history} that are taken over from it; give a longer one{shorter}"
    )


def method_name(settings: RunSettings, config: Path, preset: str | None, options: dict[str, Any]) -> str:
    """A short name for files and tables: `exact`, `motioncache-slow`, or the cache's tag if it was changed by hand.

    Args:
        settings, config: as `SettingsFiles.load` returned them for `preset` and `options`.
    """
    if settings.cache.method == "exact":
        return "exact"
    own = preset or config.stem.rpartition("_")[2]
    changed = [key for key in options if key.startswith("cache.") and key not in WITHOUT_EFFECT]
    if own not in PRESETS or changed:
        return settings.cache.tag
    return f"motioncache-{own}" if own in PAPERS else own


def _stem(preset: str) -> str:
    """The file that holds a preset: `fast` for `flowcache-fast`."""
    return preset.rpartition("-")[2]


def _preset_cache(config: Path, preset: str) -> dict[str, Any]:
    family, _, own = config.stem.rpartition("_")
    sibling = config.with_name(f"{family}_{_stem(preset)}.yaml")
    if own not in STEMS or not sibling.is_file():
        raise UserError(
            f"preset {preset!r} is not defined for config {str(config)!r}: there is no {sibling.name!r} beside it; "
            "use --set cache.KEY=VALUE, or a file of configs/"
        )
    values = read_yaml(sibling)
    variants = {"": {}, **VARIANTS, **(values.get("variants") or {})}
    return {**(values.get("cache") or {}), **variants[preset.rpartition("-")[0]]}
