"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which `1e-1` and `1.5e3` would be text, with them as the numbers that they are everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in plain types.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix, that takes its name when the block ends without error."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Write JSON whole or not at all. Not-a-number and infinity are refused: JSON has neither.

    Raises:
        ValueError: the data holds a number that is not finite.
    """
    text = json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        UserError: the file is missing, is not YAML or holds something else than a mapping.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"config {str(path)!r} is not valid YAML{where}; give lines of 'key: value'") from error
    if not isinstance(data, dict):
        raise UserError(f"config {str(path)!r} holds no settings; give lines of 'key: value'")
    return data


def make_output_folder(folder: Path, option: str = "--output") -> Path:
    """Make a folder for results and try to write in it. Existing files in it stay.

    Args:
        option: what the folder is called on the command line.

    Raises:
        UserError: the folder cannot be made or written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"output folder {str(folder)!r} cannot be written ({reason}); choose another {option}"
        ) from error
    return folder


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move the files of these names that a folder holds into a new folder in it, `earlier-1` or the next free number.

    Returns:
        The new folder; None if there is no such file.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for file in found:
        file.rename(earlier / file.name)
    return earlier
