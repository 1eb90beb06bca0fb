"""Layer norm whose stored weight is one less than the weight in use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class LayerNorm1p(nn.Module):
    """Layer norm over the last axis that multiplies by `weight + 1`, in the dtype of its parameters.

    Args:
        size: channels of the normalised axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` in the dtype of the parameters -> same."""
        return F.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, EPS)
