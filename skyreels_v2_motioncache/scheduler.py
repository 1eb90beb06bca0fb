"""The noise levels that SkyReels-V2 was sampled with originally, for diffusers' UniPC scheduler."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

SIGMA_MAX = 0.999
"""Largest noise level before the shift: with 1000 training timesteps the original scheduler's first is 1 - 1/1000."""


def original_sigmas(num_steps: int) -> np.ndarray:
    """Noise levels before the shift, `[num_steps]`, falling evenly from 0.999 towards 0, which is left out.

    The original repository (SkyworkAI/SkyReels-V2, `FlowUniPCMultistepScheduler.set_timesteps`) spaces them so;
    diffusers starts at 1 and ends a step above 0.001. After a shift of 8 the timesteps differ by up to 6 at 50 steps.
    """
    return np.linspace(SIGMA_MAX, 0.0, num_steps + 1)[:-1]


class OriginalSigmasUniPC(UniPCMultistepScheduler):
    """diffusers' UniPC with the original repository's noise levels wherever a caller names none.

    The diffusion-forcing pipelines copy their scheduler for each latent frame and set the copies' timesteps by number,
    so the levels have to come from the scheduler itself.

    Example:
        >>> pipe.scheduler = OriginalSigmasUniPC.from_config(pipe.scheduler.config, flow_shift=8.0)
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """As in the base class, which shifts the sigmas by `flow_shift`; without `sigmas`, the original ones."""
        if sigmas is None:
            sigmas = original_sigmas(num_inference_steps)
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
