"""Captions per chunk: text features with special tokens in front, and the null caption."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from magi1_motioncache.plan import ChunkCall
from magi1_motioncache.special_tokens import SpecialTokenOptions, SpecialTokens

NULL_TOKENS = 50  # tokens of the null caption that are attended to


@dataclass(frozen=True)
class ChunkCaptions:
    """Caption features of every chunk of a video.

    Attributes:
        text: `[chunks, tokens, channels]`.
        text_mask: `[chunks, tokens]` bool, tokens attended to.
        null: `[tokens, channels]`.
        null_mask: `[tokens]` bool.
    """

    text: Tensor
    text_mask: Tensor
    null: Tensor
    null_mask: Tensor

    @classmethod
    def build(
        cls,
        features: Tensor,
        mask: Tensor,
        null: Tensor,
        num_chunks: int,
        prefix_chunks: int = 0,
        tokens: SpecialTokens | None = None,
        options: SpecialTokenOptions | None = None,
    ) -> ChunkCaptions:
        """Lay out the captions of a video.

        Args:
            features: `[tokens, channels]` of the text encoder.
            mask: `[tokens]`, nonzero where there is text. With no text at all every chunk gets the null caption.
            null: `[tokens, channels]`, the model's null caption.
            num_chunks: chunks of the video, prefix included.
            prefix_chunks: whole chunks given; they have no text.
            tokens: features of the special tokens; needed when `options` asks for any.
            options: which special tokens to put in front; none by default.

        Raises:
            UserError: special tokens are asked for and not given.
        """
        options = options or SpecialTokenOptions()
        length = features.shape[0]
        null = null.to(features)
        null_features, _ = options.prepend_negative(null, torch.ones(null.shape[0]), tokens)
        null_mask = torch.arange(null.shape[0], device=null.device) < NULL_TOKENS
        if not mask.any():
            shape = (num_chunks, -1)
            return cls(null_features.expand(*shape, -1), null_mask.expand(shape), null_features, null_mask)
        text, text_mask = [null] * prefix_chunks, [torch.zeros(length, dtype=torch.bool)] * prefix_chunks
        for chunk in range(prefix_chunks, num_chunks):
            chunk_text, chunk_mask = options.prepend(features, mask, tokens, chunks_left=num_chunks - 1 - chunk)
            text.append(chunk_text)
            text_mask.append(chunk_mask.bool())
        masks = torch.stack([m.to(features.device) for m in text_mask])
        return cls(torch.stack(text), masks, null_features, null_mask)

    def tokens(self, call: ChunkCall) -> Tensor:
        """The caption a forward attends to: `[1, tokens, channels]`, no padding."""
        return self._attended_text[call.chunk] if call.uses_text else self._attended_null

    # Cut once per video: a boolean index waits for the device every time.
    @cached_property
    def _attended_text(self) -> list[Tensor]:
        return [text[mask].unsqueeze(0) for text, mask in zip(self.text, self.text_mask, strict=True)]

    @cached_property
    def _attended_null(self) -> Tensor:
        return self.null[self.null_mask].unsqueeze(0)
