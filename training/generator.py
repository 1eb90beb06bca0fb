"""What every generator's task shares: captions, encoded clips, and how large a step's windows are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from training.latents import LatentPool

LATER_SHARE = 0.35
"""Share of windows of several chunks that begin later than their clip."""
WINDOW_CHUNKS = (1, 1, 1, 1, 2, 2, 2, 3, 4)
"""Mostly short windows: more clips for the same time, and what a clip shows is decided in its first chunk."""
SMALL_SIZE, FULL_SIZE = 64, 96
"""Sides of the clips in pixels, in the first part of the training and in the rest."""
TOKEN_PIXELS = 8
"""Side of a token in pixels."""


@dataclass(frozen=True)
class Windows:
    """One process's batch of a step.

    Attributes:
        clean: `[batch, channels, frames, rows, columns]` float32, normalised latents.
        captions: of each clip.
        later: `[batch]` bool, windows that do not begin with a clip's first frame.
        draw: a number in [0, 1) that all processes of this step share.
        generator: for everything else that is drawn for this batch.
    """

    clean: Tensor
    captions: list[str]
    later: Tensor
    draw: float
    generator: torch.Generator


class GeneratorTask:
    """Base of the tasks that train a text encoder and a transformer together on a pool of encoded clips.

    Args:
        transformer, text_encoder, tokenizer: the untrained model.
        pool: folder of the encoded clips.
        chunk: latent frames of a causal chunk.
        aligned: whether a window may begin only where a chunk does.
        tokens: tokens of a batch, about.
        small_share: share of the budget in which clips of `SMALL_SIZE` are used.
        device: where to train.
    """

    def __init__(
        self,
        transformer: nn.Module,
        text_encoder: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        pool: Path,
        chunk: int,
        aligned: bool,
        tokens: int,
        small_share: float,
        device: str,
    ):
        self.model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device)
        self.tokenizer, self.pool_folder, self.device = tokenizer, pool, device
        self.chunk, self.aligned, self.tokens, self.small_share = chunk, aligned, tokens, small_share
        self.pools: dict[int, LatentPool] = {}

    def draw_windows(self, step: int, progress: float, rank: int) -> Windows:
        """Draw this process's batch of a step."""
        # All processes share the window's length, so that none waits for another.
        draw = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
        size = SMALL_SIZE if progress < self.small_share else FULL_SIZE
        chunks = WINDOW_CHUNKS[int(draw[0] * len(WINDOW_CHUNKS))]
        batch = max(1, self.tokens // (chunks * self.chunk * (size // TOKEN_PIXELS) ** 2))
        generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + rank)
        clean, captions, later = self._pool(size, step).sample(
            batch,
            chunks * self.chunk,
            LATER_SHARE if chunks > 1 else 0.0,
            generator,
            stride=self.chunk if self.aligned else 1,
        )
        return Windows(clean, captions, later, draw[1], generator)

    def _pool(self, size: int, step: int) -> LatentPool:
        if size not in self.pools:
            self.pools[size] = LatentPool(self.pool_folder, size)
        elif step % 50 == 0:
            self.pools[size].refresh()
        return self.pools[size]


def mean_over_frames(error: Tensor, counts: Tensor) -> Tensor:
    """Mean of an error `[batch, channels, frames, rows, columns]` over frames that count, `[batch, frames]` bool."""
    weight = counts[:, None, :, None, None].float().to(error.device)
    return (error * weight).sum() / (weight.sum() * error[0, :, 0].numel()).clamp(min=1)
