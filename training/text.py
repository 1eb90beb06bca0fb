"""A word-level tokenizer and a tiny UMT5 encoder for the grammar of `training.procedural`."""

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training import procedural

TEXT_DIM = 64


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


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Build an untrained two-layer UMT5 encoder of width `TEXT_DIM`."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def embed(
    captions: list[str], tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, length: int
) -> torch.Tensor:
    """Embed captions as the stock pipeline does: `[batch, length, channels]`, zeros after each caption's end.

    Only as many positions as the longest caption needs go through the encoder.
    """
    device = next(encoder.parameters()).device
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    hidden = hidden * tokens.attention_mask[..., None]
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
