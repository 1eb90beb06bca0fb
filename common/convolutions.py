"""Fast convolutions of small videos on a CPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(module: nn.Module) -> None:
    """Let a module's convolutions on a CPU run in oneDNN whatever their size; elsewhere they stay as they are.

    PyTorch takes its own kernel for a batch of one whose channels x frames x rows are at most 20480 (`use_mkldnn` in
    ATen's Convolution.cpp). For the convolutions of a video autoencoder at 96x96 that kernel is four times slower.
    Nothing changes where this PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for conv in module.modules():
        if (
            isinstance(conv, (nn.Conv2d, nn.Conv3d))
            and conv.padding_mode == "zeros"
            and isinstance(conv.padding, tuple)
        ):
            conv._conv_forward = partial(_convolve, conv)


def _convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return type(conv)._conv_forward(conv, x, weight, bias)
    return torch.mkldnn_convolution(x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
