"""The MAGI-1 diffusion transformer, one chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from common.errors import UserError
from magi1_motioncache.attention import TRAINING_RANKS, Caption
from magi1_motioncache.blocks import Layer, LayerStack
from magi1_motioncache.embeddings import CaptionEmbedding, TimeEmbedding
from magi1_motioncache.kv_cache import KeyValueStore
from magi1_motioncache.rope import RotaryPositions

PATCH = 2  # latent rows and columns per token; one latent frame deep


@dataclass(frozen=True)
class ChunkInputs:
    """A chunk, ready for the block stack.

    Attributes:
        hidden: `[batch, tokens, hidden]`, compute dtype, tokens ordered frame, row, column.
        rope: `[tokens, 6 * bands]` fp32.
        condition: `[batch, 1, condition]`, compute dtype.
        captions: one per layer.
        grid: frames, rows and columns of tokens of the whole chunk.
    """

    hidden: Tensor
    rope: Tensor
    condition: Tensor
    captions: Sequence[Caption]
    grid: tuple[int, int, int]

    def select(self, tokens: Tensor) -> ChunkInputs:
        """The same chunk with only the tokens of the indices `[count]`."""
        return replace(self, hidden=self.hidden[:, tokens], rope=self.rope[tokens])


class FinalLinear(nn.Module):
    """Hidden state -> the values of one patch."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, width, bias=False)


class Magi1Transformer3DModel(ModelMixin, ConfigMixin):
    """MAGI-1 by SandAI: predicts the velocity of one chunk of latent frames given the keys and values of earlier ones.

    Parameter names and shapes are those of the published checkpoints. Chunks of one video are run one after another in
    causal order: a chunk never attends to a later one, so this equals one forward over all of them.

    With half-precision weights the embedders, the rotary frequencies, the norms of Q and K, the norms after the gates
    and the final linear stay fp32 (`_keep_in_fp32_modules`), gates and residual sums are done in fp32, and the stream
    between layers is half precision. With fp32 weights everything is fp32.

    Args:
        hidden_size: channels of the residual stream.
        num_layers: layers.
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        kv_channels: channels per head; `num_attention_heads * kv_channels` equals `hidden_size`.
        ffn_hidden_size: inner width of the MLP.
        gated_linear_unit: SwiGLU instead of GELU.
        in_channels, out_channels: channels inside the model, twice those of the latents with `half_channel_vae`.
        half_channel_vae: the latents have half of `in_channels`; they are fed in twice and the first half is read out.
        x_rescale_factor: factor on latents on the way in; the velocity is divided by it.
        caption_channels: width of the text encoder's features.
        caption_max_length: most tokens of a caption.
        cond_hidden_ratio, xattn_cond_hidden_ratio: width of condition and text states as a share of `hidden_size`.

    Raises:
        UserError: sizes that do not fit together.
    """

    _keep_in_fp32_modules = [  # noqa: RUF012  (the name and type that diffusers reads)
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "rope",
        "q_layernorm",
        "k_layernorm",
        "self_attn_post_norm",
        "mlp_post_norm",
        "final_layernorm",
        "final_linear",
    ]
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _repeated_blocks = ["Layer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 3072,
        num_layers: int = 34,
        num_attention_heads: int = 24,
        num_query_groups: int = 8,
        kv_channels: int = 128,
        ffn_hidden_size: int = 12288,
        gated_linear_unit: bool = False,
        in_channels: int = 16,
        out_channels: int = 16,
        half_channel_vae: bool = False,
        x_rescale_factor: float = 1.0,
        caption_channels: int = 4096,
        caption_max_length: int = 800,
        cond_hidden_ratio: float = 0.25,
        xattn_cond_hidden_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_attention_heads, num_query_groups, kv_channels)
        condition = int(hidden_size * cond_hidden_ratio)
        text_hidden = int(hidden_size * xattn_cond_hidden_ratio)
        patch = (1, PATCH, PATCH)
        self.x_embedder = nn.Conv3d(in_channels, hidden_size, kernel_size=patch, stride=patch, bias=False)
        self.t_embedder = TimeEmbedding(condition)
        self.y_embedder = CaptionEmbedding(caption_channels, caption_max_length, text_hidden, condition)
        self.rope = RotaryPositions(kv_channels)
        layers = [
            Layer(
                hidden_size,
                condition,
                text_hidden,
                num_attention_heads,
                num_query_groups,
                kv_channels,
                ffn_hidden_size,
                gated_linear_unit,
            )
            for _ in range(num_layers)
        ]
        self.videodit_blocks = LayerStack(layers, hidden_size)
        self.final_linear = FinalLinear(hidden_size, PATCH * PATCH * out_channels)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the residual stream between layers."""
        return self.videodit_blocks.layers[0].mlp.linear_fc2.weight.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of the latents outside the model."""
        return self.config.in_channels // 2 if self.config.half_channel_vae else self.config.in_channels

    @apply_forward_hook
    def embed(self, latents: Tensor) -> Tensor:
        """Tokens of latents.

        Args:
            latents: `[batch, latent channels, frames, height, width]` in latent pixels, height and width even.

        Returns:
            `[batch, tokens, hidden]`, compute dtype.

        Raises:
            UserError: latents whose channels, height or width do not fit.
        """
        channels, _, height, width = latents.shape[1:]
        if channels != self.latent_channels or height % PATCH or width % PATCH:
            raise UserError(
                f"latents of {channels} channels and {height}x{width}: this model takes {self.latent_channels} "
                f"channels and even sides; check the VAE and use frame sizes divisible by 16"
            )
        hidden = latents.to(self.x_embedder.weight.dtype) * self.config.x_rescale_factor
        if self.config.half_channel_vae:
            hidden = torch.cat([hidden, hidden], dim=1)
        # Selected tokens are contiguous: all tokens alike, so that compiled layers meet one layout.
        return self.x_embedder(hidden).flatten(2).transpose(1, 2).contiguous().to(self.compute_dtype)

    @apply_forward_hook
    def condition(self, timestep: Tensor, has_text: bool, shortcut: float | None = None) -> Tensor:
        """Time, step size and gate token in one vector.

        Args:
            timestep: `[batch]` fp32, 0 is noise and 1 clean.
            has_text: which of the two learned gate tokens to use; False in passes without text.
            shortcut: step size of a distilled model, None for others.

        Returns:
            `[batch, 1, condition]`, compute dtype.
        """
        embedded = self.t_embedder(timestep, self.compute_dtype)
        if shortcut is not None:
            embedded = embedded + self.t_embedder(torch.full_like(timestep, shortcut), self.compute_dtype)
        return (embedded + self.y_embedder.gate_token(has_text)).unsqueeze(1).to(self.compute_dtype)

    @apply_forward_hook
    def captions(self, caption: Tensor) -> list[Caption]:
        """A caption for each layer.

        Args:
            caption: `[batch, caption tokens, caption channels]`, no padding.
        """
        text = self.y_embedder.states(caption).to(self.compute_dtype)
        torch._dynamo.maybe_mark_dynamic(text, 1)  # one compiled layer serves captions of all lengths
        return [Caption(text) for _ in self.videodit_blocks.layers]

    def run_blocks(self, inputs: ChunkInputs, keys_values: KeyValueStore) -> Tensor:
        """The block stack: `[batch, tokens, hidden]` for the tokens of `inputs`, before the final norm."""
        hidden = inputs.hidden
        # Stores come first: asked for one more, they keep what the last layer wrote.
        for store, layer, caption in zip(
            keys_values.layers(hidden), self.videodit_blocks.layers, inputs.captions, strict=False
        ):
            hidden = layer(hidden, inputs.condition, caption, inputs.rope, store)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and linear, fp32: `[batch, tokens, hidden]` -> `[batch, tokens, 4 * out channels]`."""
        normed = self.videodit_blocks.final_layernorm(hidden.float())
        return self.final_linear.linear(normed)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patch values back to latents.

        Args:
            patches: `[batch, tokens, 4 * out channels]`, inner order row, column, channel.
            grid: frames, rows and columns of tokens.

        Returns:
            `[batch, latent channels, frames, height, width]`.
        """
        frames, rows, columns = grid
        pixels = patches.unflatten(1, grid).unflatten(-1, (PATCH, PATCH, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        pixels = pixels.reshape(patches.shape[0], -1, frames, rows * PATCH, columns * PATCH)
        return pixels[:, : self.latent_channels] / self.config.x_rescale_factor

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        first_frame: int,
        keys_values: KeyValueStore,
        has_text: bool = True,
        shortcut: float | None = None,
    ) -> Tensor:
        """Velocity of one chunk.

        Args:
            latents: as for `embed`.
            timestep, has_text, shortcut: as for `condition`.
            caption: as for `captions`.
            first_frame: absolute latent frame at which the rotary positions start.
            keys_values: takes the chunk's keys and values, returns those to attend to.

        Returns:
            `[batch, latent channels, frames, height, width]` fp32.
        """
        frames, rows, columns = latents.shape[2], latents.shape[3] // PATCH, latents.shape[4] // PATCH
        inputs = ChunkInputs(
            self.embed(latents),
            self.rope(first_frame, frames, rows, columns),
            self.condition(timestep, has_text, shortcut),
            self.captions(caption),
            (frames, rows, columns),
        )
        return self.unpatchify(self.head(self.run_blocks(inputs, keys_values)), inputs.grid)


def _check_sizes(hidden: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
    if query_heads * head_dim != hidden:
        raise UserError(f"{query_heads} heads of {head_dim} channels make {query_heads * head_dim}, not {hidden}")
    if query_heads % kv_heads:
        raise UserError(f"{query_heads} query heads do not divide among {kv_heads} key heads")
    if head_dim % 8 or hidden % TRAINING_RANKS:
        raise UserError(f"head size {head_dim} and hidden size {hidden} must be multiples of 8")
