"""K and V in 8 bits: a head's channels as whole numbers, and behind them the step that they count."""

from __future__ import annotations

import torch
from torch import Tensor

STEP_BYTES = 1  # beside its numbers, so that whatever moves rows moves both
LARGEST = 127
PER_OCTAVE = 8  # steps are powers of 2 ** (1 / 8), told by their number: a float's bytes are not for a compiled block
MIDDLE = 2.0**-6  # of the steps that can be told, 2 ** -22 to 2 ** 9.9


def pack(rows: Tensor) -> Tensor:
    """Round to 255 levels, even steps up to about the largest magnitude of each token and head.

    Args:
        rows: `[..., width]`, floating point, of magnitudes up to 120 000.

    Returns:
        `[..., width + 1]` int8. It is off by half a step at most, which is 0.0043 of the largest magnitude or 2 ** -23.
    """
    rows = rows.float()
    wanted = rows.abs().amax(-1, keepdim=True) / (LARGEST * MIDDLE)
    step = (wanted.log2() * PER_OCTAVE).ceil().clamp(-LARGEST - 1, LARGEST)
    numbers = (rows / _size(step)).round().clamp(-LARGEST, LARGEST)
    return torch.cat([numbers, step], dim=-1).to(torch.int8)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, up to rounding: `[..., width]` in `dtype`."""
    numbers, size = packed[..., :-STEP_BYTES], _size(packed[..., -STEP_BYTES:].float())
    if torch.compiler.is_compiling():  # PyTorch's compiler makes one pass of this, and refuses the other form
        return (numbers * size).to(dtype)
    # Into its own dtype at once: a layer's keys in float32 between would be four times what is read.
    return torch.mul(numbers, size, out=torch.empty_like(numbers, dtype=dtype))


def _size(step: Tensor) -> Tensor:
    return torch.exp2(step / PER_OCTAVE) * MIDDLE
