"""Latents cut into the patches that tokens are made of, and put together again."""

from __future__ import annotations

from torch import Tensor


def to_tokens(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut `[batch, channels, frames, height, width]` into patches, `[batch, tokens, channels * patch volume]`."""
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_tokens(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_tokens`; `grid` is in tokens."""
    x = x.unflatten(1, grid).unflatten(4, (-1, *patch))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
