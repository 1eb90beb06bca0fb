"""A word-level tokenizer and a tiny encoder of the T5 kind for the grammar of `training.procedural`."""

from typing import TypeVar

import tokenizers
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training import procedural

TEXT_DIM = 64
T5Encoder = TypeVar("T5Encoder", bound=PreTrainedModel)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: lower-cased words of the grammar, an end token after every text."""
    words = ["<pad>", "</s>", "<unk>", *procedural.vocabulary()]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(kind: type[T5Encoder], vocabulary_size: int) -> T5Encoder:
    """Build an untrained two-layer encoder of width `TEXT_DIM`: a `T5EncoderModel` or a `UMT5EncoderModel`."""
    return kind(
        kind.config_class(
            vocab_size=vocabulary_size,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def encode(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, encoder: PreTrainedModel, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[batch, tokens, channels]` of captions of at most `length` tokens, and a bool mask `[batch, tokens]`.

    There are as many tokens as the longest caption needs.
    """
    device = next(encoder.parameters()).device
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
    return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state, tokens.attention_mask.bool()


def embed(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, encoder: PreTrainedModel, length: int
) -> torch.Tensor:
    """Embed captions as the stock SkyReels pipeline does: `[batch, length, channels]`, zeros after a caption's end."""
    hidden, mask = encode(captions, tokenizer, encoder, length)
    return torch.nn.functional.pad(hidden * mask[..., None], (0, 0, 0, length - hidden.shape[1]))
