"""The prompts of VBench (Huang et al., CVPR 2024) by dimension, from its own files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.checks import near_miss
from common.errors import UserError
from common.runs import REPOSITORY

INFO = "VBench_full_info.json"
"""The file of the `vbench` package that lists all prompts with their dimensions."""

VENV = REPOSITORY / ".venv-vbench"
"""Where `scripts/score_vbench.sh` installs the package."""

PROMPT_LIST = {
    "human_action": "human_action",
    "object_class": "object_class",
    "subject_consistency": "subject_consistency",
    "overall_consistency": "overall_consistency",
    "multiple_objects": "multiple_objects",
    "color": "color",
    "spatial_relationship": "spatial_relationship",
    "scene": "scene",
    "temporal_style": "temporal_style",
    "temporal_flickering": "temporal_flickering",
    "appearance_style": "appearance_style",
    "dynamic_degree": "subject_consistency",
    "motion_smoothness": "subject_consistency",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "background_consistency": "scene",
}
"""All 16 dimensions, and whose prompts each is scored on. The first eleven have prompts of their own: these are the
eleven for which MotionCache's public code samples, and so the papers' videos give all 16 scores and a total."""

OWN_PROMPTS = tuple(name for name, owner in PROMPT_LIST.items() if name == owner)


def check_dimensions(names: Iterable[str]) -> tuple[str, ...]:
    """The names as they are.

    Raises:
        UserError: VBench has no dimension of one of the names.
    """
    names = tuple(names)
    for name in names:
        if name not in PROMPT_LIST:
            raise UserError(f"unknown VBench dimension {name!r}; {near_miss(str(name), PROMPT_LIST)}")
    return names


def read_prompts(
    dimensions: Sequence[str], source: Path | None = None, longer: Path | None = None
) -> list[tuple[str, str]]:
    """Prompts of some dimensions, in the order of the list, none of them twice.

    Args:
        dimensions: checked ones.
        source: `VBench_full_info.json`, or a folder with a file `<dimension>.txt` for each list of prompts, one per
            line (`prompts/prompts_per_dimension` of VBench's repository). None looks for the installed package.
        longer: folder with a file `<dimension>_longer.txt` of rewritten prompts for each list, line by line
            (`prompts_per_dimension_longer` there). Videos are made of these and named after the others.

    Returns:
        Pairs of the prompt that names the files and the text to make the video of.

    Raises:
        UserError: a file is missing, or two that belong together differ in length.
    """
    lists = list(dict.fromkeys(PROMPT_LIST[name] for name in dimensions))
    source = source or installed_info()
    found: dict[str, str] = {}
    for name in lists:
        prompts = _lines(source / f"{name}.txt") if source.is_dir() else _from_info(source, name)
        texts = prompts if longer is None else _lines(longer / f"{name}_longer.txt")
        if len(texts) != len(prompts):
            raise UserError(
                f"longer: {name}_longer.txt has {len(texts)} prompts and {name} {len(prompts)}; "
                "give both folders of one version of VBench"
            )
        for prompt, text in zip(prompts, texts, strict=True):
            found.setdefault(prompt, text)
    return list(found.items())


def installed_info() -> Path:
    """The list of prompts of the `vbench` package that is installed, without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("vbench")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    places = [Path(folder) for folder in folders] + sorted(VENV.glob("lib/python*/site-packages/vbench"))
    for place in places:
        if (place / INFO).is_file():
            return place / INFO
    raise UserError(
        "VBench's prompts are not here: the package 'vbench' is not installed; run 'pip install --no-deps vbench', or "
        f"give 'source: PATH' of {INFO} or of a folder with a file of prompts per dimension"
    )


def _from_info(path: Path, dimension: str) -> list[str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [entry["prompt_en"] for entry in entries if dimension in entry["dimension"]]
    except OSError as error:
        raise UserError(f"source {str(path)!r} cannot be read: {error.strerror}; give VBench's {INFO}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"source {str(path)!r} is not a list of VBench's prompts; give its {INFO}") from error


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompts {str(path)!r} cannot be read: {error.strerror}; give one prompt per line") from error
    return [line.strip() for line in lines if line.strip()]
