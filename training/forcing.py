"""Noise levels of causal chunks for diffusion forcing, as the asynchronous sampler meets them.

`u` is a chunk's place in its own sampling schedule: 1 is pure noise, 0 is finished. Noise level and timestep follow
from it by the flow shift of the sampler.
"""

import torch

TIMESTEPS = 1000


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise level sigma in [0, 1] at place `u` of a flow schedule with a shift."""
    return shift * u / (1 + (shift - 1) * u)


def draw_places(
    batch: int, chunks: int, generator: torch.Generator, lag: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each chunk's place in its schedule.

    Half of the samples are lagged as in asynchronous sampling: each chunk is later than the one before by `lag` or, if
    that is None, by a lag that is the sample's own, the last one is always active, and those that would be past their
    end are finished context. Of the rest, two thirds have independent places (a third of these after finished context,
    as when a long video goes on) and one third are equal, as in synchronous sampling.

    Returns:
        Places `[batch, chunks]` in [0, 1], and a mask `[batch, chunks]` of the chunks that are being denoised.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    order = torch.arange(chunks - 1, -1, -1)[None]
    lagged = uniform(batch, 1) - order * (0.04 + 0.3 * uniform(batch, 1) if lag is None else lag)
    independent = uniform(batch, chunks)
    ready = (uniform(batch, 1) < 1 / 3) & (torch.arange(chunks)[None] < (uniform(batch, 1) * chunks).long())
    independent = torch.where(ready, torch.zeros(()), independent)
    equal = uniform(batch, 1).expand(batch, chunks)
    kind = uniform(batch, 1)
    places = torch.where(kind < 0.5, lagged, torch.where(kind < 5 / 6, independent, equal))
    return places.clamp(0, 1), places > 0
