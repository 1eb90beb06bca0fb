"""Checkpoint folders in the diffusers layout, checked by their small files before gigabytes are loaded."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import UserError
from common.runs import REPOSITORY

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def local_folder(model: str) -> Path | None:
    """The folder of a model, looked for where the command was started and in this repository; None without one."""
    return next((folder for folder in (Path(model).expanduser(), REPOSITORY / model) if folder.is_dir()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        return content
    except FileNotFoundError as error:
        raise UserError(f"checkpoint file {str(path)!r} is missing; fetch it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint file {str(path)!r} cannot be read: it is damaged; fetch it again") from error


def read_index(folder: Path, parts: Iterable[str]) -> dict[str, Any]:
    """`model_index.json` of a folder that holds all `parts`.

    Raises:
        UserError: names the first part that is missing.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"checkpoint {str(folder)!r} has no model_index.json; give a folder in the diffusers layout")
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


def value_of(path: Path, *keys: str) -> Any:
    """A value of a checkpoint's JSON file, by the keys that lead to it.

    Raises:
        UserError: the file is missing or damaged, or has no such value.
    """
    value: Any = read_json(path)
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"checkpoint file {str(path)!r} has no {'.'.join(keys)!r}; fetch it again")
        value = value[key]
    return value


def check_weights(folder: Path, packed: str = "", pickled: bool = False) -> None:
    """Check that one part's files are all there, and as long as they promise to be.

    Args:
        folder: of the part.
        packed: suffix of compressed files that may stand in for plain ones, and are only looked for.
        pickled: whether PyTorch's own files, `pytorch_model*.bin`, will do where there are no safetensors.

    Raises:
        UserError: a file is missing or truncated.
    """
    names = _weight_files(folder, "*.safetensors", packed)
    pickles = _weight_files(folder, "pytorch_model*.bin") if pickled and not names else []
    if not names and not pickles:
        raise UserError(f"checkpoint {str(folder.parent)!r} has no weights: no *.safetensors in {folder.name!r}")
    for name in names:
        if not (packed and (folder / (name + packed)).is_file()):
            _header(folder / name)
    for name in pickles:
        _check_pickle(folder / name)


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer's words are there: transformers makes one without words where their file is missing.

    Raises:
        UserError: neither of the files that may hold them is there.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"tokenizer {str(folder)!r} has no {' or '.join(TOKENIZER_FILES)}; fetch it again")


def check_complete(model: nn.Module, folder: Path) -> None:
    """Check that the files of a part held every tensor of the model that was loaded from them, and no more layers.

    The libraries leave a tensor that no file has empty, or random, leave out those that the model lacks, and tell it to
    a log.

    Args:
        model: as loaded, on the CPU.
        folder: of the part, as `check_weights` accepts.

    Raises:
        UserError: names a tensor that the files lack, or the model.
    """
    stored = {name for file in folder.glob("*.safetensors") for name in _header(file)}
    tensors = model.state_dict()
    places = {tensor.data_ptr() for name, tensor in tensors.items() if name in stored}
    parts = {name.partition(".")[0] for name in tensors}
    for name in sorted(stored - tensors.keys()):
        if name.partition(".")[0] in parts:  # others belong to a larger model, such as a text encoder's decoder
            raise UserError(
                f"checkpoint {str(folder.parent)!r} does not fit its configuration: {folder.name!r} has {name!r}, for "
                "which the configured model has no place; fetch it again"
            )
    for name, tensor in tensors.items():
        tied = not tensor.is_meta and tensor.data_ptr() in places  # stored once, under another name
        if name not in stored and not tied:
            raise UserError(
                f"checkpoint {str(folder.parent)!r} does not fit its configuration: {name!r} is in no file of "
                f"{folder.name!r}; fetch it again"
            )


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


def _weight_files(folder: Path, pattern: str, packed: str = "") -> list[str]:
    """Names of a part's weight files, those of an index where there is one."""
    names = {file.name.removesuffix(packed) for end in ("", packed) for file in folder.glob(pattern + end)}
    for index in folder.glob(pattern + ".index.json"):
        names = set(value_of(index, "weight_map").values())
    return sorted(names)


def _check_pickle(file: Path) -> None:
    """A `UserError` unless a file of `torch.save` is whole: a zip archive has its contents listed at its end."""
    try:
        with file.open("rb") as stream:
            start = stream.read(1)
    except OSError as error:
        raise UserError(f"checkpoint file {str(file)!r} cannot be read: {error.strerror}; fetch it again") from error
    older = start == b"\x80"  # before PyTorch 1.6 it was a bare pickle, whose length nothing tells
    if not older and not zipfile.is_zipfile(file):
        size = file.stat().st_size
        raise UserError(f"checkpoint file {str(file)!r} is truncated: {size} bytes, no archive; fetch it again")


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of each tensor; a `UserError` unless the file is as long as it promises there."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else {}
    except OSError as error:
        raise UserError(f"checkpoint file {str(file)!r} cannot be read: {error.strerror}; fetch it again") from error
    except (struct.error, ValueError):
        header = {}
    header.pop("__metadata__", None)
    expected = 8 + length + max(entry["data_offsets"][1] for entry in header.values()) if header else None
    found = file.stat().st_size
    if expected != found:
        promise = f", its header promises {expected}" if expected else ", its header is damaged"
        raise UserError(f"checkpoint file {str(file)!r} is truncated: {found} bytes{promise}; fetch it again")
    return header
