"""K and V in 8 bits: a head's channels as whole numbers, and behind them the step that they count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP_BYTES = 1  # beside its numbers, so that whatever moves rows moves both
LARGEST = 127
PER_OCTAVE = 8  # steps are powers of 2 ** (1 / 8), told by their exponent: a float's bytes are not for a compiled block
BASE = 2 ** (1 / PER_OCTAVE)


def pack(rows: Tensor) -> Tensor:
    """Round to 255 levels, even steps up to about the largest magnitude of each token and head.

    Args:
        rows: `[..., width]`, floating point, of magnitudes up to 7 million.

    Returns:
        `[..., width + 1]` int8. It is off by half a step at most: 0.0043 of the largest magnitude, or 2 ** -17.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    exponent = ((largest.log2() - math.log2(LARGEST)) * PER_OCTAVE).ceil().clamp(-LARGEST - 1, LARGEST)
    return torch.cat([(rows / _step(exponent)).round(), exponent], dim=-1).to(torch.int8)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, up to rounding: `[..., width]` in `dtype`."""
    numbers, step = packed[..., :-STEP_BYTES], _step(packed[..., -STEP_BYTES:])
    if torch.compiler.is_compiling():  # PyTorch's compiler makes one pass of this, and refuses the other form
        return (numbers * step).to(dtype)
    # Into its own dtype at once: a layer's keys in float32 between would be four times what is read.
    return torch.mul(numbers, step, out=torch.empty_like(numbers, dtype=dtype))


def _step(exponent: Tensor) -> Tensor:
    return torch.pow(BASE, exponent.float())
