"""Learned caption tokens for quality, motion, style and the length still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from common.errors import UserError

ROWS = {
    "transition": 0,
    "high_quality": 1,
    "static_first_frames": 2,
    "dynamic_first_frames": 3,
    "borderness": 4,
    "three_d_model": 15,
    "two_d_anime": 16,
}
DURATION_ROW = 7  # row of the last chunk; one more for every chunk still to come
DURATION_STEPS = 8
FEWEST_ROWS = 1 + max(*ROWS.values(), DURATION_ROW + DURATION_STEPS - 1)


class SpecialTokens(ModelMixin, ConfigMixin):
    """Features of the special tokens, under the names of `special_tokens.npz`.

    The published values are rounded to fp16 before use; they are kept in fp32.

    Args:
        caption_channels: width of the features.
        num_other_tokens: rows of `other_tokens`.

    Raises:
        UserError: fewer rows than there are tokens to take from them.
    """

    _keep_in_fp32_modules = ["caption_token", "logo_token", "other_tokens"]  # noqa: RUF012

    @register_to_config
    def __init__(self, caption_channels: int = 4096, num_other_tokens: int = 100) -> None:
        super().__init__()
        if num_other_tokens < FEWEST_ROWS:
            raise UserError(f"other_tokens has {num_other_tokens} rows; the special tokens are in {FEWEST_ROWS}")
        self.caption_token = nn.Parameter(torch.zeros(1, caption_channels), requires_grad=False)
        self.logo_token = nn.Parameter(torch.zeros(1, caption_channels), requires_grad=False)
        self.other_tokens = nn.Parameter(torch.zeros(num_other_tokens, caption_channels), requires_grad=False)

    def row(self, name: str) -> Tensor:
        """Features `[1, channels]` of "caption", "logo", or a token of `ROWS`."""
        if name in ("caption", "logo"):
            return getattr(self, f"{name}_token")
        return self.other_tokens[ROWS[name] : ROWS[name] + 1]

    def duration(self, chunks_left: int) -> Tensor:
        """Features `[1, channels]` for a chunk that `chunks_left` more follow; the scale ends at seven."""
        row = DURATION_ROW + min(chunks_left, DURATION_STEPS - 1)
        return self.other_tokens[row : row + 1]


@dataclass(frozen=True)
class SpecialTokenOptions:
    """Which special tokens to use. They are put in front one by one, so the last of these comes first in the caption.

    Attributes:
        static_first_frames, dynamic_first_frames: how still the video begins.
        borderness: frame borders.
        high_quality: used by the published scripts.
        three_d_model, two_d_anime: style.
        duration: how many chunks are still to come, different for every chunk; used by the published scripts.
        negative: put tokens of captions, logos, transitions and borders in front of the null caption.
    """

    static_first_frames: bool = False
    dynamic_first_frames: bool = False
    borderness: bool = False
    high_quality: bool = False
    three_d_model: bool = False
    two_d_anime: bool = False
    duration: bool = False
    negative: bool = False

    def prepend(
        self, features: Tensor, mask: Tensor, tokens: SpecialTokens | None, chunks_left: int
    ) -> tuple[Tensor, Tensor]:
        """Put the chosen tokens in front of a caption and cut it to its old length.

        Args:
            features: `[tokens, channels]`.
            mask: `[tokens]`.
            tokens: their features; may be None when none is chosen.
            chunks_left: chunks after this one.

        Returns:
            Features and mask of the same length.

        Raises:
            UserError: tokens are chosen and not given.
        """
        names = (
            "static_first_frames",
            "dynamic_first_frames",
            "borderness",
            "high_quality",
            "three_d_model",
            "two_d_anime",
        )
        chosen = [name for name in names if getattr(self, name)]
        if not chosen and not self.duration:
            return features, mask
        tokens = _required(tokens)
        rows = [tokens.row(name) for name in chosen]
        if self.duration:
            rows.append(tokens.duration(chunks_left))
        return _put_in_front(rows, features, mask)

    def prepend_negative(self, features: Tensor, mask: Tensor, tokens: SpecialTokens | None) -> tuple[Tensor, Tensor]:
        """The same for the null caption: `[tokens, channels]` and `[tokens]` -> same lengths."""
        if not self.negative:
            return features, mask
        tokens = _required(tokens)
        return _put_in_front(
            [tokens.row(name) for name in ("caption", "logo", "transition", "borderness")], features, mask
        )


def _put_in_front(rows: list[Tensor], features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    length = features.shape[0]
    front = torch.cat(rows[::-1]).to(features)
    ones = torch.ones(len(rows), dtype=mask.dtype, device=mask.device)
    return torch.cat([front, features])[:length], torch.cat([ones, mask])[:length]


def _required(tokens: SpecialTokens | None) -> SpecialTokens:
    if tokens is None:
        raise UserError("special caption tokens are asked for but not loaded; pass special_tokens or switch them off")
    return tokens
