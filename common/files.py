"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError


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
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"config {str(path)!r} is not valid YAML{where}; give lines of 'key: value'") from error
    if not isinstance(data, dict):
        raise UserError(f"config {str(path)!r} holds no settings; give lines of 'key: value'")
    return data


def make_output_folder(folder: Path) -> Path:
    """Make a folder for results and try to write in it. Existing files in it stay, until one of their name is written.

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
            f"output folder {str(folder)!r} cannot be written ({reason}); choose another --output"
        ) from error
    return folder
