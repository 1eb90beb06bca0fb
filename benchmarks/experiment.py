"""What a comparison is made of: a model, prompts and methods, in one YAML file (`configs/experiments/`).

    config: configs/skyreels_v2_tiny_slow.yaml      # the model, and settings that all methods share
    settings: {steps: 50}                           # those of them that differ from the file
    prompts: {split: reporting, count: 16}          # or {file: prompts.txt}, or {vbench: [color, scene], samples: 5}
    seed: 0                                         # prompt number i gets seed + i
    methods:
      exact: {}                                     # the reference, always made first
      stock: {}                                     # the unmodified pipeline, where there is one
      exact-bfloat16: {preset: exact, dtype: bfloat16}
      motioncache-slow: {preset: slow}
      "flowcache@0.4": {preset: flowcache-slow, cache: {threshold: 0.1}}

Paths are relative to the repository's root, or absolute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.subject import load_settings
from benchmarks.vbench_prompts import OWN_PROMPTS, check_dimensions, read_prompts
from common.cache import MotionCacheConfig
from common.checks import check_keys, check_range, check_type
from common.compare import EXACT, STOCK
from common.errors import UserError
from common.files import read_yaml
from common.runs import REPOSITORY
from common.settings import LARGEST_SEED, RunSettings
from training import procedural

DTYPES = ("float32", "bfloat16", "float16")
STEM_LENGTH = 48


@dataclass(frozen=True)
class Prompt:
    """One video to make with every method.

    Attributes:
        text: what to show.
        index: its number in the experiment.
        seed: of the noise.
        stem: what its files are called.
    """

    text: str
    index: int
    seed: int
    stem: str


@dataclass(frozen=True)
class Method:
    """One way of making the videos.

    Attributes:
        name: of its folder and its row.
        cache: how to cache; None is the unmodified pipeline.
        dtype: instead of the config's.
        preset: that the cache settings began with; None for those of the config itself.
    """

    name: str
    cache: MotionCacheConfig | None
    dtype: str | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file.

    Attributes:
        path: the file.
        config: the model's settings file.
        settings: what is in it, with `changes`.
        changes: settings that differ from the file, by name; those of a section as `sampling.<name>`.
        prompts: in their order.
        methods: by name, `exact` first.
    """

    path: Path
    config: Path
    settings: RunSettings
    changes: dict[str, Any]
    prompts: list[Prompt]
    methods: dict[str, Method]

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read a file and check all of it.

        Raises:
            UserError: a key, a value or a file that it names is wrong.
        """
        values = read_yaml(path)
        check_keys("experiment setting", values, ["config", "settings", "prompts", "seed", "methods"])
        for key, kind in (("config", str), ("prompts", dict), ("methods", dict)):
            if not isinstance(values.get(key), kind) or not values[key]:
                raise UserError(f"experiment {str(path)!r} needs '{key}: ...'; see an example in configs/experiments/")
        seed = values.get("seed", 0)
        check_type("seed", seed, int)
        check_range("seed", seed, 0, LARGEST_SEED)
        config = REPOSITORY / values["config"]
        changes = _changes(values.get("settings") or {})
        settings = load_settings(config, options=changes)
        if settings.kind != "text":
            raise UserError(
                f"config {str(config)!r} gives a {settings.kind}, and experiments are of text alone; leave it out"
            )
        methods = {name: _method(str(name), given or {}, config, settings) for name, given in values["methods"].items()}
        if EXACT not in methods:
            raise UserError("methods: the reference is missing, with which all are compared; add a line 'exact: {}'")
        methods = {EXACT: methods.pop(EXACT), **methods}
        return cls(path, config, settings, changes, _prompts(values["prompts"], seed), methods)


def _changes(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"settings: {given!r} is not allowed; give {{steps: 50, ...}}")
    for name in given:
        if name in ("prompt", "seed") or str(name).partition(".")[0] == "cache":
            raise UserError(f"settings: {name} is not allowed; the experiment's prompts, seed and methods say it")
    return given


def _method(name: str, given: Any, config: Path, settings: RunSettings) -> Method:
    if not re.fullmatch(r"[A-Za-z0-9][\w.@+=-]*", name):
        raise UserError(f"method name {name!r} is not allowed: it names a folder; use letters, digits and - _ . @ + =")
    if not isinstance(given, dict):
        raise UserError(f"method {name!r}: {given!r} is not allowed; give {{preset: ..., dtype: ..., cache: {{...}}}}")
    check_keys(f"setting of method {name!r}", given, ["preset", "dtype", "cache"])
    dtype, preset, changes = given.get("dtype"), given.get("preset"), given.get("cache") or {}
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"method {name!r}: dtype {dtype!r} is not allowed; give {', '.join(DTYPES)}")
    if not isinstance(changes, dict):
        raise UserError(f"method {name!r}: cache {changes!r} is not allowed; give {{threshold: 0.1, ...}}")
    if name == STOCK:
        if preset is not None or changes:
            raise UserError("method 'stock' is the unmodified pipeline and takes no preset and no cache settings")
        if getattr(settings, "stock", "none") == "none":
            raise UserError(f"method 'stock': there is no unmodified pipeline for {str(config)!r}; leave 'stock' out")
        return Method(name, None, dtype)
    try:
        return Method(name, _cache(name, preset, changes, config, settings), dtype, preset)
    except UserError as error:
        raise UserError(f"method {name!r}: {error}") from error


def _cache(
    name: str, preset: str | None, changes: dict[str, Any], config: Path, settings: RunSettings
) -> MotionCacheConfig:
    if EXACT in (name, preset):  # any config knows it, and keeps where K/V are stored
        return settings.cache.replace(**{**changes, "method": "exact"})
    return load_settings(config, preset, {f"cache.{key}": value for key, value in changes.items()}).cache


def _prompts(given: dict[str, Any], seed: int) -> list[Prompt]:
    kinds: dict[str, Callable[[dict[str, Any], int], list[Prompt]]] = {
        "split": _of_split,
        "file": _of_file,
        "vbench": _of_vbench,
    }
    named = [kind for kind in kinds if kind in given]
    if len(named) != 1:
        raise UserError("prompts: give one of {split: NAME, count: N}, {file: PATH} and {vbench: [DIMENSION, ...]}")
    found = kinds[named[0]](given, seed)
    if not found:
        raise UserError(f"prompts: {named[0]} {given[named[0]]!r} gives no prompt at all")
    return found


def _of_split(given: dict[str, Any], seed: int) -> list[Prompt]:
    check_keys("setting of prompts", given, ["split", "count"])
    return _numbered(procedural.prompts(given["split"], _count(given, "count", 16)), seed)


def _of_file(given: dict[str, Any], seed: int) -> list[Prompt]:
    check_keys("setting of prompts", given, ["file", "count"])
    path = REPOSITORY / str(given["file"])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: file {str(path)!r} cannot be read; give a text file, one prompt per line") from error
    prompts = [line for line in lines if line]
    return _numbered(prompts[: _count(given, "count", len(prompts))], seed)


def _of_vbench(given: dict[str, Any], seed: int) -> list[Prompt]:
    """VBench's: several samples of each prompt, in files named `PROMPT-SAMPLE`.

    Seeds count the samples of one prompt and not the prompts, so that more dimensions can be added to a folder.
    """
    check_keys("setting of prompts", given, ["vbench", "samples", "source", "longer"])
    names = given["vbench"]
    if names != "all" and not isinstance(names, list):
        raise UserError(f"prompts: vbench: {names!r} is not allowed; give a list of dimensions, or 'all'")
    paths = {key: REPOSITORY / str(given[key]) for key in ("source", "longer") if given.get(key)}
    pairs = read_prompts(OWN_PROMPTS if names == "all" else check_dimensions(names), **paths)
    samples = range(_count(given, "samples", 5))
    return [
        Prompt(text, number * len(samples) + sample, seed + sample, f"{_file_name(name)}-{sample}")
        for number, (name, text) in enumerate(pairs)
        for sample in samples
    ]


def _numbered(texts: list[str], seed: int) -> list[Prompt]:
    return [Prompt(text, i, seed + i, f"{i:04d}-{_slug(text)}") for i, text in enumerate(texts)]


def _count(given: dict[str, Any], key: str, default: int) -> int:
    if key not in given:
        return default
    check_type(f"prompts: {key}", given[key], int)
    check_range(f"prompts: {key}", given[key], 1)
    return given[key]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:STEM_LENGTH].strip("-")


def _file_name(prompt: str) -> str:
    if "/" in prompt:
        raise UserError(f"prompt {prompt!r} cannot name a file, as VBench wants it; leave the '/' out")
    return prompt
