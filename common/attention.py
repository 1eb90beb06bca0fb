"""Attention without a mask, through diffusers' backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import is_flash_attn_available, is_flash_attn_version
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_FLASH_INSTALLED = is_flash_attn_available() and is_flash_attn_version(">=", "2.6.3")  # the least that diffusers takes
_FEW_QUERIES = 192  # below, PyTorch's CPU kernel takes smaller blocks, and a second thread hardly speeds it up
_BESIDES_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_cudnn_left_out = False


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName | None = None) -> Tensor:
    """Softmax attention of all queries to all keys.

    Args:
        query: `[batch, queries, heads, head dim]`.
        key, value: `[batch, keys, heads, head dim]`.
        backend: one chosen by the user. Without one, flash-attn where it is installed and takes the tensors, plain
            matrix products for few float32 queries on several CPU threads, else diffusers' active backend (PyTorch's
            scaled dot product unless it was changed).

    Returns:
        `[batch, queries, heads, head dim]`.
    """
    if backend is None:
        if _FLASH_INSTALLED and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            backend = AttentionBackendName.FLASH
        elif _suits_matrix_products(query):
            return _matrix_products(query, key, value)
    if _cudnn_left_out and torch.compiler.is_compiling():
        # A graph keeps the kernel that it was compiled with. Said in it, the choice is the graph's, and calls outside
        # of `without_cudnn` get one of their own.
        with sdpa_kernel(_BESIDES_CUDNN):
            return dispatch_attention_fn(query, key, value, backend=backend)
    return dispatch_attention_fn(query, key, value, backend=backend)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside, PyTorch's own choice of an attention kernel is never cuDNN, which it prefers on recent GPUs.

    cuDNN plans for every shape that it meets, which takes longer than many attentions of a shape that comes once; and a
    stock model's mask of a whole window has more elements than it counts to.
    """
    global _cudnn_left_out
    before = torch.backends.cuda.cudnn_sdp_enabled(), _cudnn_left_out
    torch.backends.cuda.enable_cudnn_sdp(False)
    _cudnn_left_out = True
    try:
        yield
    finally:
        enabled, _cudnn_left_out = before
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def _suits_matrix_products(query: Tensor) -> bool:
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    return on_cpu and query.shape[1] < _FEW_QUERIES and _threads() > 1


@torch.compiler.assume_constant_result  # asking for it would split a compiled block
def _threads() -> int:
    return torch.get_num_threads()


def _matrix_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with all scores in memory at a time: few queries make that little."""
    batch, _, heads, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads)).transpose(1, 2)
