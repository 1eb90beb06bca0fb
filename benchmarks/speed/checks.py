"""Whether a device computes what it should, at the tiny size: told before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.compiling import CompiledBlocks
from benchmarks.speed.subject import WHOLE, Mode, Subject
from common.cache import MotionCacheConfig

CPU = torch.device("cpu")
EXACT = Mode("exact", MotionCacheConfig(method="exact"))
STOCK = Mode("stock", None)
BUDGET = 0.4
SAME_DEVICE, OTHER_DEVICE, COMPILED = 1e-4, 1e-3, 0.05
"""Tolerances: float32 sums in another order; on another device, over all steps; bfloat16 rounded at other places."""

COMPILED_ITERATIONS = 3
"""Of a whole video's, which has more shapes to compile for than there is time."""

Make = Callable[[str, torch.device, torch.dtype], Subject]


@dataclass(frozen=True)
class Check:
    """Two ways to one video.

    Attributes:
        model: name of the model.
        name: what is compared.
        tolerance: largest relative difference that is allowed.
        compare: gives the two videos' latents, which are compared.
    """

    model: str
    name: str
    tolerance: float
    compare: Callable[[], tuple[Tensor, Tensor]]

    def run(self) -> float:
        """Largest difference of a value, relative to the largest value; infinite if anything is not finite."""
        ours, reference = (latents.double().cpu() for latents in self.compare())
        difference = ((ours - reference).abs().max() / reference.abs().max()).item()
        return difference if difference < torch.inf else torch.inf


def checks(make: Make, device: torch.device) -> Iterator[Check]:
    """Of one model with random weights, the same on both devices.

    Args:
        make: the model's `Subject`.
        device: to be checked.
    """
    subject = make("tiny", CPU, torch.float32)
    cached = Mode("cached", subject.cached.replace(budget=BUDGET))

    def against_cpu(mode: Mode) -> tuple[Tensor, Tensor]:
        return _video(subject, mode, device, WHOLE), _video(subject, mode, CPU, WHOLE)

    if subject.has_stock:
        yield Check(
            subject.name,
            "exact against stock, float32",
            SAME_DEVICE,
            lambda: (_video(subject, EXACT, device, WHOLE), _video(subject, STOCK, device, WHOLE)),
        )
    else:
        yield Check(subject.name, "exact against the CPU, float32", OTHER_DEVICE, lambda: against_cpu(EXACT))
    yield Check(subject.name, "cached against the CPU, float32", OTHER_DEVICE, lambda: against_cpu(cached))


def compiled_checks(make: Make, device: torch.device, backend: str) -> Iterator[Check]:
    """The same of compiled blocks, by a backend of `torch.compile`."""
    subject = make("tiny", device, torch.bfloat16)
    blocks = CompiledBlocks(subject.transformer, backend)
    few = subject.steady(COMPILED_ITERATIONS)
    try:
        yield Check(
            subject.name,
            "exact compiled against eager, bfloat16",
            COMPILED,
            lambda: (_video(subject, EXACT, device, few, blocks), _video(subject, EXACT, device, few)),
        )
    finally:
        torch._dynamo.reset()  # a function's graphs are limited in number, and blocks of other sizes need theirs


def _video(
    subject: Subject, mode: Mode, device: torch.device, iterations: slice, blocks: CompiledBlocks | None = None
) -> Tensor:
    """Latents that the iterations end with."""
    subject.to(device)
    # cuDNN's convolutions of float32 round what they multiply to 10 bits unless told otherwise.
    unrounded = torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False)
    with unrounded, nullcontext() if blocks is None else blocks.on(), subject.session(mode, iterations) as session:
        return session.denoise(lambda: None)
