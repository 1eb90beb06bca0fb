"""What every generator's task shares: captions, encoded clips, and how large a step's windows are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from training.latents import LatentPool

LATER_SHARE = 0.35
"""Share of windows of several chunks that begin later than their clip."""
FULL_SIZE = 96
"""Side in pixels of the clips that the model is made for."""
TOKEN_PIXELS = 8
"""Side of a token in pixels."""


@dataclass(frozen=True)
class Phase:
    """A part of the training: which clips it sees, and how much of each at once."""

    pool: str
    """Name of the folder of its encoded clips."""
    size: int
    """Side of its clips in pixels."""
    until: float
    """Share of the budget at which the next phase begins."""
    windows: tuple[int, ...] = ()
    """Numbers of chunks that windows have, each equally often; empty: only a clip's first latent frame."""


PHASES = (
    # What a shape looks like is learned from pictures: a step holds nine times as many of them as of chunks.
    Phase("pictures", 64, 0.4),
    # How it moves takes windows of several chunks, which are cheap while they are small.
    Phase("small", 64, 0.8, (1, 1, 2, 2, 2, 3, 3, 4, 4)),
    Phase("full", FULL_SIZE, 1.0, (1, 1, 2, 2, 2, 3, 3, 4, 4)),
)
"""From cheap to dear. Windows of one chunk stay among them: what a clip shows is decided in its first chunk."""


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
        phases: what is seen when.
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
        phases: tuple[Phase, ...],
        device: str,
    ):
        self.model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device)
        self.tokenizer, self.pool_folder, self.device = tokenizer, pool, device
        self.chunk, self.aligned, self.tokens, self.phases = chunk, aligned, tokens, phases
        self.pools: dict[str, LatentPool] = {}

    def draw_windows(self, step: int, progress: float, rank: int) -> Windows:
        """Draw this process's batch of a step."""
        # All processes share the window's length, so that none waits for another.
        draw = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
        phase = next((phase for phase in self.phases if progress < phase.until), self.phases[-1])
        chunks = phase.windows[int(draw[0] * len(phase.windows))] if phase.windows else 0
        frames = chunks * self.chunk or 1
        batch = max(1, self.tokens // (frames * (phase.size // TOKEN_PIXELS) ** 2))
        generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + rank)
        clean, captions, later = self._pool(phase.pool, step).sample(
            batch,
            frames,
            LATER_SHARE if chunks > 1 else 0.0,
            generator,
            stride=self.chunk if self.aligned else 1,
        )
        return Windows(clean, captions, later, draw[1], generator)

    def chunks_of(self, latents: Tensor) -> tuple[int, int]:
        """Return how many chunks a window's latents are and of how many frames: pictures are chunks of one."""
        chunks = max(1, latents.shape[2] // self.chunk)
        return chunks, latents.shape[2] // chunks

    def _pool(self, name: str, step: int) -> LatentPool:
        if name not in self.pools:
            self.pools[name] = LatentPool(self.pool_folder / name)
        elif step % 50 == 0:
            self.pools[name].refresh()
        return self.pools[name]


def mean_over_frames(error: Tensor, counts: Tensor) -> Tensor:
    """Mean of an error `[batch, channels, frames, rows, columns]` over frames that count, `[batch, frames]` bool."""
    weight = counts[:, None, :, None, None].float().to(error.device)
    return (error * weight).sum() / (weight.sum() * error[0, :, 0].numel()).clamp(min=1)
