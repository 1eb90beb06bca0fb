"""Calls that a GPU has one kernel for and the meta device takes apart, or that never become an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.speed.allocations import tensors_in
from benchmarks.speed.pretended import GPU, HOST, PretendedGpu, size_of

IS_CUDA = torch.Tensor.is_cuda.__get__


class GpuFunctions(TorchFunctionMode):
    """Answers such calls as a GPU would, and says of tensors on the meta device that they are on one.

    Args:
        gpu: counts them.
    """

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self._own = {
            F.scaled_dot_product_attention: self._attention,
            F.rms_norm: self._rms_norm,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:  # a new object at each access
            return args[0].is_meta
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or HOST) == GPU:
            return func(*args, **{**kwargs, "device": HOST}).to(GPU)
        own = self._own.get(func)
        if own is not None and tensors_in((*args, *kwargs.values()))[0].is_meta:
            return own(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Result and log-sum-exp of the flash kernel; with a mask the memory-efficient one, which has no log-sum-exp.

        A mask of booleans becomes one of numbers at each call, in the dtype of the query (`convert_boolean_attn_mask`
        in aten/src/ATen/native/transformers/attention.cpp). Where its rows are not aligned it is copied once more;
        that is left out.
        """
        self.gpu.kernels += 1
        beside = []  # what lives as long as the call
        if attn_mask is None:
            beside.append(query.new_empty(query.shape[:-1], dtype=torch.float32))
        elif attn_mask.dtype == torch.bool:
            self.gpu.kernels += 1
            beside.append(torch.empty_like(attn_mask, dtype=query.dtype))
            self.gpu.moved += size_of(attn_mask) + size_of(beside[-1])
        rows = query.transpose(1, 2)
        return rows.new_empty((*rows.shape[:-1], value.shape[-1])).transpose(1, 2)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        """One kernel where dtypes agree (`_fused_rms_norm`), which also keeps the factor of each row."""
        if weight is not None and weight.dtype != x.dtype:
            return torch.rms_norm(x, shape, weight, eps)
        self.gpu.kernels += 1
        self.gpu.moved += 2 * size_of(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        x.new_empty((*x.shape[: x.dim() - len(shape)], 1), dtype=torch.float32)
        return out


@contextmanager
def pretended(parts: Callable[[], dict[str, int]] = dict) -> Iterator[PretendedGpu]:
    """Inside, the meta device stands for a GPU; `parts` as for `Allocations`."""
    with PretendedGpu(parts) as gpu, GpuFunctions(gpu):
        yield gpu
