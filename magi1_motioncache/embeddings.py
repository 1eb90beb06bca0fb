"""Time, step size and captions as the transformer sees them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SINUSOID_WIDTH = 256
SINUSOID_PERIOD = 10_000.0
TIME_SCALE = 1000


class TimeEmbedding(nn.Module):
    """A number -> sinusoid -> two linears. Serves the time t in [0, 1] and the step size of distilled models alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor, sinusoid_dtype: torch.dtype) -> Tensor:
        """Embed numbers.

        Args:
            value: `[batch]` fp32.
            sinusoid_dtype: dtype the sinusoid is rounded to before the fp32 linears.

        Returns:
            `[batch, width]` in the dtype of the linears.
        """
        half = SINUSOID_WIDTH // 2
        # Step sizes take the arguments to 32 000, where one unit in the last place of a frequency is 2e-3 radians.
        # Hence this order of operations, and the exponential in fp64: that of fp32 differs between processors.
        exponents = -math.log(SINUSOID_PERIOD) * torch.arange(half, dtype=torch.float32, device=value.device) / half
        frequencies = exponents.double().exp().float()
        angles = value.float().unsqueeze(-1) * frequencies * TIME_SCALE
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(sinusoid_dtype).to(self.mlp[0].weight.dtype))


class CaptionEmbedding(nn.Module):
    """Projections of caption features, and the learned caption of no text.

    The gates never see the prompt: they get the last but one row of the null caption in passes with text and the last
    row in passes without.

    Args:
        channels: width of the text encoder's features.
        length: most tokens of a caption, and rows of the null caption.
        text_hidden: width of the text states.
        condition: width of the condition vector.
    """

    def __init__(self, channels: int, length: int, text_hidden: int, condition: int) -> None:
        super().__init__()
        self.null_caption_embedding = nn.Parameter(torch.zeros(length, channels))
        self.y_proj_xattn = nn.Sequential(nn.Linear(channels, text_hidden), nn.SiLU())
        self.y_proj_adaln = nn.ModuleList([nn.Linear(channels, condition)])

    def states(self, caption: Tensor) -> Tensor:
        """`[batch, tokens, channels]` -> `[batch, tokens, text hidden]`, in the dtype of the linear."""
        return self.y_proj_xattn(caption.to(self.null_caption_embedding.dtype))

    def gate_token(self, has_text: bool) -> Tensor:
        """The caption's share of the condition vector: `[condition]`."""
        row = self.null_caption_embedding[-2 if has_text else -1]
        return self.y_proj_adaln[0](row)
