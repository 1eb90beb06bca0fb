"""Checkpoint folders in the diffusers layout, checked by their small files before gigabytes are loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs import REPOSITORY


def local_folder(model: str) -> Path | None:
    """The folder of a model, looked for where the command was started and in this repository; None without one."""
    return next((folder for folder in (Path(model).expanduser(), REPOSITORY / model) if folder.is_dir()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"checkpoint file {str(path)!r} is missing; give a folder in the diffusers layout") from error
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint file {str(path)!r} cannot be read: it is damaged; fetch it again") from error


def read_index(folder: Path, parts: Iterable[str]) -> dict[str, Any]:
    """`model_index.json` of a folder that holds all `parts`.

    Raises:
        UserError: names the first part that is missing.
    """
    index = read_json(folder / "model_index.json")
    for name in parts:
        if name not in index or not (folder / name).is_dir():
            raise UserError(
                f"checkpoint {str(folder)!r} has no {name!r}; give a folder that save_pretrained wrote whole"
            )
    return index


def check_class(folder: Path, part: str, config: dict[str, Any], allowed: Iterable[str], advice: str) -> None:
    """Raise a `UserError` with `advice` unless a part's `config` is of one of the `allowed` classes."""
    found, needed = config.get("_class_name"), list(allowed)
    if found not in needed:
        raise UserError(
            f"checkpoint {str(folder)!r} is of another architecture: its {part} is {found!r}, not {needed[0]!r}; "
            f"{advice}"
        )


def check_weights(folder: Path) -> None:
    """Compare the length of one part's safetensors files with what their headers promise.

    Raises:
        UserError: a file is missing or truncated.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not files:
        raise UserError(f"checkpoint {str(folder.parent)!r} has no weights: no *.safetensors in {folder.name!r}")
    for file in files:
        _check_length(file)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in a block that loads `folder` into one line.

    Raises:
        UserError: the weights do not fit the configuration, or a file is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # loaders of three libraries, each with errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be loaded ({type(error).__name__}: {reason}); fetch it again"
        ) from error


def _check_length(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else {}
    except OSError as error:
        raise UserError(f"checkpoint file {str(file)!r} cannot be read: {error.strerror}; fetch it again") from error
    except (struct.error, ValueError):
        header = {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected, found = 8 + length + max(ends, default=-1) if ends else None, file.stat().st_size
    if expected != found:
        promise = f", its header promises {expected}" if expected else ", its header is damaged"
        raise UserError(f"checkpoint file {str(file)!r} is truncated: {found} bytes{promise}; fetch it again")
