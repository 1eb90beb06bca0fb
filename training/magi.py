"""A small MAGI-1 model: text encoder and transformer, trained together on encoded clips."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5EncoderModel

from magi1_motioncache.attention import TRAINING_RANKS, ParallelAttention, grouped_attention
from magi1_motioncache.captions import NULL_TOKENS
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.rope import rotate
from magi1_motioncache.schedule import transformed
from magi1_motioncache.transformer import PATCH, Magi1Transformer3DModel
from training.forcing import draw_places
from training.generator import FULL_SIZE, PHASES, TOKEN_PIXELS, GeneratorTask, Phase, mean_over_frames
from training.text import TEXT_DIM, build_text_encoder, build_tokenizer, encode

SAMPLING = SamplingConfig(
    num_steps=32,
    window_size=4,
    chunk_width=3,
    noise2clean_kvrange=(5, 4, 3, 2),
    clean_chunk_kvrange=1,
    cfg_number=3,
    prev_chunk_scales=(1.5, 1.5, 1.5, 1.0, 1.0),
    text_scales=(4.0, 4.0, 4.0, 1.0, 1.0),
    distill=False,
    scale_factor=1.0,
)
"""How the model is trained to be sampled; stored in its folder. The guidance scales may be changed afterwards."""

CAPTION_DROPOUT = 0.15
"""Share of samples without text: alone as in the unconditional pass, or with history as in the null-text pass."""
PREFIX_SHARE = 0.1
"""Share of samples whose first noisy chunk begins with given frames, as after an image or a video."""
GATE_BIAS = 1.0
"""Argument of tanh in the gates at first. The norm behind a gate makes up for its level, but not for a sign."""
UPDATE_SCALE = 0.2
"""Deviation of each update of the residual stream at first; the stream itself begins with about 0.6."""
ROPE_BANDS = (1.1, 0.4, 0.14, 0.05)
"""Radians per latent frame, and per 0.73 tokens at 96 pixels: waves from 4 to 90 tokens. The published ones, made for
larger heads, leave only two of four that differ over a picture this small."""


def build_transformer(channels: int) -> Magi1Transformer3DModel:
    """Build an untrained transformer of 1.9 M parameters."""
    model = Magi1Transformer3DModel(
        hidden_size=192,
        num_layers=5,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=32,
        ffn_hidden_size=416,
        in_channels=channels,
        out_channels=channels,
        caption_channels=TEXT_DIM,
        caption_max_length=NULL_TOKENS + 2,  # the last two rows of the null caption are the gates' tokens
    )
    nn.init.normal_(model.y_embedder.null_caption_embedding)
    nn.init.zeros_(model.final_linear.linear.weight)
    model.rope.bands.data.copy_(torch.tensor(ROPE_BANDS))
    model.rope.bands.requires_grad_(False)
    # Blocks that start close to the identity train faster.
    for layer in model.videodit_blocks.layers:
        nn.init.zeros_(layer.ada_modulate_layer.proj[0].weight)
        nn.init.constant_(layer.ada_modulate_layer.proj[0].bias, GATE_BIAS)
        for norm in (layer.self_attn_post_norm, layer.mlp_post_norm):
            nn.init.constant_(norm.weight, UPDATE_SCALE - 1)  # stored minus one
    return model


@dataclass(frozen=True)
class ChunkBatch:
    """Windows of chunks, each chunk with a time, a caption and a range of its own.

    Attributes:
        latents: `[batch, channels, frames, rows, columns]`, frames of all chunks one after another.
        time: `[batch, chunks]`, 0 is noise and 1 clean.
        captions: `[batch, tokens, text_channels]`.
        caption_mask: `[batch, tokens]` bool, tokens that there are.
        uses_text: `[batch, chunks]` bool, chunks that attend to their caption; others attend to the null caption.
        text_gate: `[batch, chunks]` bool, chunks whose gates get the token of passes with text.
        starts: `[batch, chunks]` integers on the CPU, the first chunk that each attends to.
    """

    latents: Tensor
    time: Tensor
    captions: Tensor
    caption_mask: Tensor
    uses_text: Tensor
    text_gate: Tensor
    starts: Tensor


def range_starts(progress: Tensor, active: Tensor, sampling: SamplingConfig) -> Tensor:
    """First chunk that each chunk attends to, as a sampling plan has it.

    Args:
        progress: `[batch, chunks]`, share of a chunk's steps that it has behind it, in [0, 1).
        active: `[batch, chunks]` bool, chunks that are not finished.
        sampling: holds the ranges.

    Returns:
        `[batch, chunks]` int64.
    """
    widths = torch.tensor(sampling.noise2clean_kvrange)
    noisy = widths[(progress * len(widths)).long().clamp(max=len(widths) - 1)]
    width = torch.where(active, noisy, torch.tensor(sampling.clean_chunk_kvrange))
    return (torch.arange(1, progress.shape[1] + 1) - width).clamp(min=0)


def ranged_attention(query: Tensor, key_value: Tensor, starts: Tensor) -> Tensor:
    """Block-causal attention without a mask: each chunk of queries meets the keys from its start to its own end.

    Args:
        query: `[batch, tokens, query_heads, head_dim]`, tokens of all chunks.
        key_value: `[batch, tokens, kv_heads, 2 * head_dim]`, K then V.
        starts: `[batch, chunks]` on the CPU; samples with equal starts are run together.

    Returns:
        `[batch, tokens, query_heads * head_dim]`.
    """
    size = query.shape[1] // starts.shape[1]
    parts = []
    for chunk in range(starts.shape[1]):
        end = (chunk + 1) * size
        groups = [(s, (starts[:, chunk] == s).nonzero()[:, 0]) for s in starts[:, chunk].unique().tolist()]
        if len(groups) == 1:
            rows = key_value[:, groups[0][0] * size : end]
            parts.append(grouped_attention(query[:, end - size : end], *rows.chunk(2, dim=-1)))
            continue
        members = [indices.to(query.device) for _, indices in groups]
        outputs = [
            grouped_attention(query[i, end - size : end], *key_value[i, start * size : end].chunk(2, dim=-1))
            for (start, _), i in zip(groups, members, strict=True)
        ]
        parts.append(torch.cat(outputs)[torch.cat(members).argsort()])
    return torch.cat(parts, dim=1)


def caption_attention(attention: ParallelAttention, query: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Attention of each chunk to the text tokens that are its own.

    Args:
        attention: holds the projection of text.
        query: `[batch, chunks * tokens, query_heads, head_dim]`.
        text: `[batch, text_tokens, text_hidden]`.
        mask: `[batch, chunks, text_tokens]` bool.

    Returns:
        `[batch, chunks * tokens, query_heads * head_dim]`.
    """
    batch, chunks = mask.shape[:2]
    key_value = attention.linear_kv_xattn(text).unflatten(-1, (-1, 2 * attention.head_dim))
    key, value = key_value.transpose(1, 2).chunk(2, dim=-1)
    heads = key.shape[1]

    def per_chunk(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, chunks, -1, -1, -1).flatten(0, 1)

    # The query heads that share a key head are more queries of it: [batch * chunks, kv_heads, queries, head_dim].
    folded = query.unflatten(2, (heads, -1)).unflatten(1, (chunks, -1)).permute(0, 1, 3, 4, 2, 5)
    groups, tokens = folded.shape[3:5]
    out = F.scaled_dot_product_attention(
        folded.reshape(batch * chunks, heads, groups * tokens, -1),
        per_chunk(attention.k_layernorm_xattn(key)),
        per_chunk(value),
        attn_mask=mask.flatten(0, 1)[:, None, None],
    )
    out = out.view(batch, chunks, heads, groups, tokens, -1).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, chunks * tokens, -1)


def forward_chunks(
    model: Magi1Transformer3DModel, batch: ChunkBatch, rope_grid: tuple[int, int] | None = None
) -> Tensor:
    """Run all chunks of all windows at once, every chunk with the keys and values of its own time.

    Equal up to rounding to running the model chunk after chunk as the sampler does. For models of `build_transformer`:
    latents are neither rescaled nor doubled.

    Args:
        model: the transformer.
        batch: what to run.
        rope_grid: rows and columns of tokens of a picture from which the latents are cut out; their own by default.

    Returns:
        The predicted velocity, of the shape of the latents, fp32.
    """
    frames, rows, columns = (n // p for n, p in zip(batch.latents.shape[2:], (1, PATCH, PATCH), strict=True))
    samples, chunks = batch.time.shape
    rope = model.rope(0, frames, *(rope_grid or (rows, columns))).unflatten(
        0, (frames, *(rope_grid or (rows, columns)))
    )
    rope = rope[:, :rows, :columns].flatten(0, 2)
    hidden = model.x_embedder(batch.latents).flatten(2).transpose(1, 2)
    gate_tokens = torch.stack([model.y_embedder.gate_token(False), model.y_embedder.gate_token(True)])
    condition = model.t_embedder(batch.time.flatten(), hidden.dtype) + gate_tokens[batch.text_gate.flatten().long()]
    null = model.y_embedder.null_caption_embedding[:NULL_TOKENS].expand(samples, -1, -1)
    text = model.y_embedder.states(torch.cat([batch.captions, null], dim=1))
    own = batch.uses_text[:, :, None]
    mask = torch.cat([own & batch.caption_mask[:, None], ~own.expand(-1, -1, NULL_TOKENS)], dim=2)

    def add_gated(hidden: Tensor, update: Tensor, gate: Tensor, norm: nn.Module) -> Tensor:
        return hidden + norm(update.reshape(samples * chunks, -1, hidden.shape[-1]) * gate).view_as(hidden)

    for layer in model.videodit_blocks.layers:
        attention_gate, mlp_gate = layer.ada_modulate_layer(condition[:, None])
        update = _attention(layer.self_attention, hidden, text, mask, rope, batch.starts)
        hidden = add_gated(hidden, update, attention_gate, layer.self_attn_post_norm)
        hidden = add_gated(hidden, layer.mlp(hidden), mlp_gate, layer.mlp_post_norm)
    return model.unpatchify(model.head(hidden), (frames, rows, columns))


def _attention(
    attention: ParallelAttention, hidden: Tensor, text: Tensor, mask: Tensor, rope: Tensor, starts: Tensor
) -> Tensor:
    project = attention.linear_qkv
    normed = project.layer_norm(hidden)
    query, captioned, key, value = (
        linear(normed).unflatten(-1, (-1, attention.head_dim))
        for linear in (project.q, project.qx, project.k, project.v)
    )
    query, key = rotate(attention.q_layernorm(query), rope), rotate(attention.k_layernorm(key), rope)
    attended = ranged_attention(query, torch.cat([key, value], dim=-1), starts)
    captioned = caption_attention(attention, attention.q_layernorm_xattn(captioned), text, mask)
    # What `interleave` does to the activations, done to the weight: it is smaller.
    own, text_part = attention.linear_proj.weight.unflatten(1, (TRAINING_RANKS, 2, -1)).unbind(2)
    return F.linear(attended, own.flatten(1)) + F.linear(captioned, text_part.flatten(1))


class Magi1Task(GeneratorTask):
    """Flow matching in MAGI-1's convention, from noise at time 0 to clean latents at 1, with a time for each chunk.

    Half of the windows are as the sampler's: each chunk a stage of the window behind the one before it, those past
    their end finished and run at `clean_t` without text. The others have independent or equal times.
    """

    def __init__(
        self,
        channels: int,
        pool: Path,
        tokens: int = 1728,
        phases: tuple[Phase, ...] = PHASES,
        device: str = "cpu",
    ):
        tokenizer = build_tokenizer()
        super().__init__(
            build_transformer(channels),
            build_text_encoder(T5EncoderModel, len(tokenizer)),
            tokenizer,
            pool,
            chunk=SAMPLING.chunk_width,
            aligned=True,
            tokens=tokens,
            phases=phases,
            device=device,
        )

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether a 2-D parameter is a projection inside a layer; those of the gates start at zero."""
        return name.startswith("transformer.videodit_blocks.layers.") and "ada_modulate_layer" not in name

    def draw_batch(self, clean: Tensor, later: Tensor, generator: torch.Generator) -> tuple[ChunkBatch, Tensor, Tensor]:
        """Draw noise, times and guidance passes of a batch, without captions yet.

        Args:
            clean: `[batch, channels, frames, rows, columns]`, normalised latents.
            later: `[batch]` bool, windows that do not begin with a clip's first frame.
            generator: source of all draws.

        Returns:
            The batch, the noise of its latents' shape, and a mask `[batch, frames]` of the frames being denoised.
        """
        samples, (chunks, width) = len(clean), self.chunks_of(clean)
        places, active = draw_places(samples, chunks, generator, lag=1 / SAMPLING.window_size)
        # A clip begins with its sprites in view; in its middle they may be anywhere, so that windows from there go on
        # from a finished chunk.
        active[:, 0] &= ~later
        progress = 1 - places
        time = torch.where(active, transformed(progress), torch.tensor(SAMPLING.clean_t))
        with_text = torch.rand(samples, 1, generator=generator) >= CAPTION_DROPOUT
        # The keys of a finished chunk are those of the null-text pass, but for one step of every stage those of the
        # pass that attends to them, whose gates differ.
        fresh = torch.rand(samples, 1, generator=generator) < 1 / SAMPLING.steps_per_stage
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(noise, clean, time.repeat_interleave(width, 1)[:, None, :, None, None])
        # Given frames take the place of noisy ones; their chunk's time stays.
        lengths = torch.randint(1, max(2, width), (samples, 1), generator=generator)
        lengths = lengths * (torch.rand(samples, 1, generator=generator) < PREFIX_SHARE) * (width > 1)
        place = torch.arange(chunks * width)[None] - width * active.int().argmax(1, keepdim=True)
        given = (place >= 0) & (place < lengths)
        batch = ChunkBatch(
            latents=torch.where(given[:, None, :, None, None], clean, noisy),
            time=time,
            captions=torch.zeros(samples, 0, TEXT_DIM),
            caption_mask=torch.zeros(samples, 0, dtype=torch.bool),
            uses_text=active & with_text,
            text_gate=with_text & (active | fresh),
            starts=range_starts(progress, active, SAMPLING),
        )
        return batch, noise, active.repeat_interleave(width, 1) & ~given

    def loss(self, step: int, progress: float, rank: int, world: int) -> Tensor:
        """Velocity error over the chunks being denoised of a batch of about `tokens` tokens."""
        windows = self.draw_windows(step, progress, rank)
        drawn, noise, denoised = self.draw_batch(windows.clean, windows.later, windows.generator)
        transformer = self.model["transformer"]
        length = transformer.config.caption_max_length
        captions, mask = encode(windows.captions, self.tokenizer, self.model["text_encoder"], length)
        batch = ChunkBatch(
            latents=drawn.latents.to(self.device),
            time=drawn.time.to(self.device),
            captions=captions,
            caption_mask=mask,
            uses_text=drawn.uses_text.to(self.device),
            text_gate=drawn.text_gate.to(self.device),
            starts=drawn.starts,
        )
        # A small clip shows sprites of the same size in pixels: its positions are those of a part of a full one.
        side = FULL_SIZE // TOKEN_PIXELS
        velocity = forward_chunks(transformer, batch, rope_grid=(side, side))
        target = (windows.clean - noise).to(self.device)
        return mean_over_frames((velocity - target).square(), denoised)
