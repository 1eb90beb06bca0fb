"""Half precision for all of a model but the parts that it wants in float32."""

from __future__ import annotations

import torch
from diffusers.models.modeling_utils import ModelMixin


def to_mixed_precision(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Cast a model in place, as diffusers loads it: all but `_keep_in_fp32_modules`, whose values stay as they were.

    Args:
        model: any model of diffusers' form.
        dtype: of all other parameters.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        keep = not set(name.split(".")).isdisjoint(model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model
