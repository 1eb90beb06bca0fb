"""Weights of the quantised checkpoints, back in half precision.

The published fp8 linears divide their input by a scale, round it to e4m3, and multiply the product by the scales of
input and weight. Folding the scales into the weight gives the same linear without the rounding of the input.

The product is flashinfer's `bmm_fp8`, which hands cuBLASLt a pointer to the input's scale and no mode of scaling: of a
scale per channel it reads the first entry, by which the whole product is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError

SCALES = ("weight_scale", "input_scale", "smooth_scale")


def dequantise(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Replace every quantised weight and its scales by one plain weight.

    Two forms exist, which divide column `i` of the input by different scales: `input_scale[i]`, with weight
    `w * weight_scale * input_scale[0] / input_scale[i]`, and `smooth_scale[i]` where there is one, with weight
    `w * weight_scale * input_scale[0] / smooth_scale[i]`.

    Args:
        tensors: a checkpoint; plain tensors pass through.
        dtype: of the weights made.

    Returns:
        Tensors under the names of the plain checkpoint.

    Raises:
        UserError: scales without a weight, or without one another.
    """
    plain = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in SCALES}
    modules = {name.rpartition(".")[0] for name in tensors.keys() - plain.keys()}
    for module in sorted(modules):
        if f"{module}.weight" not in plain:
            raise UserError(f"the checkpoint has scales of {module} but not its weight; download its files again")
        plain[f"{module}.weight"] = _plain_weight(tensors, module).to(dtype)
    return plain


def _plain_weight(tensors: dict[str, Tensor], module: str) -> Tensor:
    missing = [name for name in ("weight_scale", "input_scale") if f"{module}.{name}" not in tensors]
    if missing:
        raise UserError(f"the checkpoint lacks {module}.{missing[0]}; download its files again")
    weight = tensors[f"{module}.weight"].float().squeeze(0) * tensors[f"{module}.weight_scale"].float()
    scale = tensors[f"{module}.input_scale"].float()
    divisor = tensors.get(f"{module}.smooth_scale", scale).float()
    return weight * (scale[0] / divisor)
