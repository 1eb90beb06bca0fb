"""The two vision transformers of the VAE: patches to moments, and latents to frames."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_NORM_EPS = 1e-5


class HeadNormAttention(nn.Module):
    """Self-attention over all tokens whose queries, keys and values are each normalised over the head's channels."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` -> same."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        deviation = qkv.std(dim=-1, keepdim=True, unbiased=False) + HEAD_NORM_EPS
        query, key, value = ((qkv - qkv.mean(dim=-1, keepdim=True)) / deviation).unbind(2)
        return self.proj(dispatch_attention_fn(query, key, value).flatten(2))


class Mlp(nn.Module):
    """Two linears and GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` -> same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention on the stream as it is, then a normed MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.attn = HeadNormAttention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` -> same."""
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class TokenStack(nn.Module):
    """What encoder and decoder share: a class token, resizable positions, blocks, a norm.

    Args:
        grid: frames, rows and columns of latents that the positions were learned for.
        width, depth, heads: size of the transformer.
        mlp_ratio: inner width of the MLPs as a multiple of `width`.
        qkv_bias: whether Q, K and V have biases.
    """

    def __init__(
        self, grid: tuple[int, int, int], width: int, depth: int, heads: int, mlp_ratio: float, qkv_bias: bool
    ) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1] * grid[2], width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio, qkv_bias) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def transform(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """`[batch, tokens, width]` of a tile of `grid` latents -> the same, transformed and normed."""
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self._positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        first, learned = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, self.grid)
        resized = F.interpolate(learned.movedim(-1, 1), size=grid, mode="trilinear", align_corners=False)
        return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbedding(nn.Module):
    """Non-overlapping blocks of pixels -> tokens."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)


class Encoder(TokenStack):
    """Frames -> mean and log variance of the latents; `patch` is frames, rows and columns of pixels per latent."""

    def __init__(
        self, patch: tuple[int, int, int], channels: int, latent_channels: int, width: int, **stack: object
    ) -> None:
        super().__init__(width=width, **stack)
        self.patch_embed = PatchEmbedding(channels, width, patch)
        self.last_layer = nn.Linear(width, 2 * latent_channels)

    def forward(self, frames: Tensor) -> Tensor:
        """`[batch, 3, frames, height, width]` -> `[batch, 2 * latent channels, latent frames, rows, columns]`."""
        patches = self.patch_embed.proj(frames)
        grid = tuple(patches.shape[2:])
        tokens = self.transform(patches.flatten(2).transpose(1, 2), grid)
        return self.last_layer(tokens).transpose(1, 2).unflatten(2, grid)


class Decoder(TokenStack):
    """Latents -> frames; the last convolution runs over the pixels of one tile."""

    def __init__(
        self, patch: tuple[int, int, int], channels: int, latent_channels: int, width: int, **stack: object
    ) -> None:
        super().__init__(width=width, **stack)
        self.patch = patch
        self.proj_in = nn.Linear(latent_channels, width)
        self.last_layer = nn.Conv3d(width // (patch[0] * patch[1] * patch[2]), channels, kernel_size=3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[batch, latent channels, latent frames, rows, columns]` -> `[batch, 3, frames, height, width]`."""
        grid = tuple(latents.shape[2:])
        tokens = self.transform(self.proj_in(latents.flatten(2).transpose(1, 2)), grid)
        pixels = tokens.unflatten(1, grid).unflatten(-1, (*self.patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        size = [count * step for count, step in zip(grid, self.patch, strict=True)]
        return self.last_layer(pixels.reshape(len(latents), -1, *size))
