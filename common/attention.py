"""Attention without a mask, through diffusers' backends."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import is_flash_attn_available, is_flash_attn_version
from torch import Tensor

_FLASH_INSTALLED = is_flash_attn_available() and is_flash_attn_version(">=", "2.6.3")  # the least that diffusers takes


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName | None = None) -> Tensor:
    """Softmax attention of all queries to all keys.

    Args:
        query: `[batch, queries, heads, head dim]`.
        key, value: `[batch, keys, heads, head dim]`.
        backend: one chosen by the user. Without one, flash-attn where it is installed and takes the tensors, else
            diffusers' active backend (PyTorch's scaled dot product unless it was changed).

    Returns:
        `[batch, queries, heads, head dim]`.
    """
    if backend is None and _FLASH_INSTALLED and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        backend = AttentionBackendName.FLASH
    return dispatch_attention_fn(query, key, value, backend=backend)
