"""A prompt -> features of the T5 encoder."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from magi1_motioncache.caption_cleaning import clean_caption


@torch.no_grad()
def encode_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    encoder: T5EncoderModel,
    length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Clean, tokenize and encode a prompt.

    Args:
        prompt: any text; an empty one gives the features of the end token.
        tokenizer, encoder: T5 v1.1.
        length: tokens to pad or cut to.
        device: where the encoder computes; by default where its weights are, which is wrong when they are offloaded.

    Returns:
        Features `[length, channels]` fp32 and mask `[length]` int64, on that device.
    """
    tokens = tokenizer(
        [clean_caption(prompt)],
        max_length=length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(device or encoder.device)
    hidden = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return hidden[0].float(), tokens.attention_mask[0]
