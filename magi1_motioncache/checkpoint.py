"""Reads published checkpoints: sharded, compressed or quantised, and nothing missing in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from common.checkpoints import value_of
from common.errors import UserError
from common.precision import to_mixed_precision
from magi1_motioncache.fp8 import dequantise
from magi1_motioncache.presets import Variant
from magi1_motioncache.transformer import Magi1Transformer3DModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPRESSED = ".zst"
FAULTS_NAMED = 5


def weights_folder(path: Path, variant: Variant) -> Path:
    """The folder with the tensors: `path` itself, or the variant's folder inside it.

    Raises:
        UserError: neither holds any.
    """
    for folder in (path / variant.weights, path):
        if any((folder / name).exists() for name in (INDEX, SINGLE, SINGLE + COMPRESSED)):
            return folder
    raise UserError(f"no {INDEX} or {SINGLE} in {path} or {path / variant.weights}; give the checkpoint's folder")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, on the CPU, as they are stored.

    Args:
        folder: holds `model.safetensors`, or an index and shards; each file may be compressed with zstd (`.zst`).

    Raises:
        UserError: a file is missing, cut off, or lacks a tensor that the index puts there.
    """
    index = folder / INDEX
    if not index.exists():
        return _read_file(folder / SINGLE)
    places: dict[str, str] = value_of(index, "weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        stored = _read_file(folder / shard)
        expected = [name for name, place in places.items() if place == shard]
        missing = [name for name in expected if name not in stored]
        if missing:
            raise UserError(f"{folder / shard} lacks {', '.join(missing)}; download it again")
        tensors.update({name: stored[name] for name in expected})
    return tensors


def load_transformer(path: Path, variant: Variant, dtype: torch.dtype = torch.bfloat16) -> Magi1Transformer3DModel:
    """A published transformer, quantised ones with their weights back in `dtype`.

    Args:
        path: the variant's folder or the one with its tensors.
        variant: which checkpoint it is.
        dtype: of everything that does not stay fp32.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        UserError: unreadable files, or tensors that are missing, surplus or of another shape.
    """
    with torch.device("meta"):
        model = Magi1Transformer3DModel(**variant.transformer)
    tensors = dequantise(read_tensors(weights_folder(Path(path), variant)), dtype)
    check_tensors(model, tensors, str(path))
    model.load_state_dict(tensors, assign=True)
    return to_mixed_precision(model, dtype).requires_grad_(False).eval()


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Every tensor of the model must be there in its shape, and no other.

    Args:
        model: may be on the meta device.
        tensors: what was read.
        source: named in the error.

    Raises:
        UserError: names the first tensors that are missing, surplus or mis-shaped.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    faults += [f"surplus {name} {tuple(value.shape)}" for name, value in tensors.items() if name not in expected]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} and should be {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if faults:
        more = f"; and {len(faults) - FAULTS_NAMED} more" if len(faults) > FAULTS_NAMED else ""
        named = "; ".join(faults[:FAULTS_NAMED]) + more
        raise UserError(f"{source} does not fit the model: {named}; check the variant and the download")


def _read_file(path: Path) -> dict[str, Tensor]:
    compressed = path.with_name(path.name + COMPRESSED)
    try:
        if compressed.exists():
            with compressed.open("rb") as stream:
                return load(zstandard.ZstdDecompressor().stream_reader(stream).read())
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; download the checkpoint again") from error
    except (OSError, SafetensorError, zstandard.ZstdError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again") from error
