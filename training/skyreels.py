"""A small SkyReels-V2 diffusion-forcing model: text encoder and transformer, trained together on encoded clips."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SkyReelsV2Transformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from training.forcing import TIMESTEPS, draw_places, shifted
from training.generator import PHASES, GeneratorTask, Phase, mean_over_frames
from training.text import TEXT_DIM, build_text_encoder, build_tokenizer, embed

BLOCK = 3
"""Latent frames of a causal chunk."""
CAPTION_DROPOUT = 0.1
TEXT_LENGTH, LONG_TEXT_LENGTH = 32, 512
CONTEXT_NOISE_TIMESTEP = 20
"""The noise the pipeline's `addnoise_condition` adds to finished context, in timesteps."""


def build_transformer(channels: int) -> SkyReelsV2Transformer3DModel:
    """Build an untrained transformer of 3.6 M parameters."""
    model = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=448,
        num_layers=7,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        inject_sample_info=False,
        rope_max_seq_len=1024,
        num_frame_per_block=BLOCK,
    )
    # Blocks that start as the identity train faster: no modulation but a small gate, no output.
    nn.init.zeros_(model.condition_embedder.time_proj.weight)
    nn.init.zeros_(model.condition_embedder.time_proj.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)
        block.scale_shift_table.data[:, (2, 5)] = 0.2
    return model


def chunked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: int) -> torch.Tensor:
    """Block-causal attention without a mask: each chunk of queries meets the keys up to its own end.

    Args:
        query: `[batch, heads, tokens, head_dim]`; key and value have the same shape.
        chunk: tokens per causal chunk.
    """
    parts = []
    for start in range(0, query.shape[2], chunk):
        end = start + chunk
        parts.append(F.scaled_dot_product_attention(query[:, :, start:end], key[:, :, :end], value[:, :, :end]))
    return torch.cat(parts, dim=2)


def forward_frames(
    model: SkyReelsV2Transformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Run the stock model's weights with block-causal attention per chunk and modulation per frame.

    Equal to the stock forward with `enable_diffusion_forcing=True` up to rounding, in about half the time: no mask over
    all pairs of tokens, no copy of a frame's modulation for each of its tokens.

    Args:
        latents: `[batch, channels, frames, height, width]`, `frames` a multiple of the causal block.
        timestep: `[batch, frames]`.
        text: `[batch, text_tokens, text_channels]`.

    Returns:
        The predicted velocity, of the shape of `latents`.
    """
    batch, _, frames, height, width = latents.shape
    heads, per_frame = model.config.num_attention_heads, (height // 2) * (width // 2)
    chunk = model.config.num_frame_per_block * per_frame
    cos, sin = model.rope(latents)
    rotation = torch.complex(cos[..., 0::2], sin[..., 1::2]).to(torch.complex64).transpose(1, 2)
    hidden = model.patch_embedding(latents).flatten(2).transpose(1, 2)
    temb, modulation, text, _ = model.condition_embedder(timestep, text)
    modulation = modulation.unflatten(-1, (6, -1))

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotation
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def modulate(x: torch.Tensor, norm: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = norm(x).unflatten(1, (frames, per_frame))
        return torch.addcmul(shift, x, 1 + scale).flatten(1, 2)

    def gated(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(
            x.unflatten(1, (frames, per_frame)), update.unflatten(1, (frames, per_frame)), gate
        ).flatten(1, 2)

    for block in model.blocks:
        # [batch, frames, 6, channels] -> six of [batch, frames, 1, channels]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table[:, None] + modulation).split(1, 2)
        x, attn = modulate(hidden, block.norm1, scale, shift), block.attn1
        query, key = rotate(split(attn.norm_q(attn.to_q(x)))), rotate(split(attn.norm_k(attn.to_k(x))))
        x = chunked_attention(query, key, split(attn.to_v(x)), chunk)
        hidden = gated(hidden, attn.to_out[0](x.transpose(1, 2).flatten(2)), gate)

        x, attn = block.norm2(hidden), block.attn2
        query, key = split(attn.norm_q(attn.to_q(x))), split(attn.norm_k(attn.to_k(text)))
        x = F.scaled_dot_product_attention(query, key, split(attn.to_v(text)))
        hidden = hidden + attn.to_out[0](x.transpose(1, 2).flatten(2))

        hidden = gated(hidden, block.ffn(modulate(hidden, block.norm3, ffn_scale, ffn_shift)), ffn_gate)

    shift, scale = (model.scale_shift_table[:, None] + temb[:, :, None]).split(1, 2)
    out = model.proj_out(modulate(hidden, model.norm_out, scale, shift))
    out = out.view(batch, frames, height // 2, width // 2, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class SkyReelsTask(GeneratorTask):
    """Flow matching with a noise level of its own for each causal chunk."""

    def __init__(
        self,
        channels: int,
        pool: Path,
        tokens: int = 1728,
        shift: float = 3.0,
        phases: tuple[Phase, ...] = PHASES,
        device: str = "cpu",
    ):
        tokenizer = build_tokenizer()
        super().__init__(
            build_transformer(channels),
            build_text_encoder(UMT5EncoderModel, len(tokenizer)),
            tokenizer,
            pool,
            chunk=BLOCK,
            aligned=False,
            tokens=tokens,
            phases=phases,
            device=device,
        )
        self.shift = shift

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a 2-D parameter is a projection inside a transformer block."""
        return name.startswith("transformer.blocks.") and name.endswith(".weight")

    def loss(self, step: int, progress: float, rank: int, world: int) -> torch.Tensor:
        """Velocity error over the chunks being denoised of a batch of about `tokens` tokens."""
        windows = self.draw_windows(step, progress, rank)
        clean, generator = windows.clean, windows.generator
        batch, (chunks, width) = len(clean), self.chunks_of(clean)
        length = LONG_TEXT_LENGTH if windows.draw < 1 / 16 else TEXT_LENGTH
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        captions = ["" if drop else caption for drop, caption in zip(dropped, windows.captions, strict=True)]
        places, active = draw_places(batch, chunks, generator)
        # The autoencoder codes a clip's first frame in its own way, so only a window that begins there may begin in
        # noise; a later one goes on from a finished chunk, as in long videos.
        active[:, 0] &= ~windows.later
        places = places * active
        sigma = shifted(places, self.shift)
        noisy_context = ~active & (torch.rand(batch, 1, generator=generator) < 0.3)
        sigma = torch.where(noisy_context, CONTEXT_NOISE_TIMESTEP / TIMESTEPS, sigma).repeat_interleave(width, 1)
        timestep = (sigma * TIMESTEPS).floor().clamp(max=TIMESTEPS - 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, :, None, None])
        noisy, timestep, target = (x.to(self.device) for x in (noisy, timestep, noise - clean))
        text = embed(captions, self.tokenizer, self.model["text_encoder"], length)
        error = F.mse_loss(forward_frames(self.model["transformer"], noisy, timestep, text), target, reduction="none")
        return mean_over_frames(error, active.repeat_interleave(width, 1))
