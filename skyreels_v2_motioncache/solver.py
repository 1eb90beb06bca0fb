"""diffusers' UniPC with its coefficients worked out on the host, once for all latent frames.

The diffusion-forcing pipelines step a scheduler of its own for each latent frame. On a GPU the library's makes some
sixty small kernels of each step, moves single noise levels there and waits for them, and solves a linear system there,
which waits as well. A step is a weighted sum of a few latents, though, and the weights depend on noise levels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers import SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

Weights = dict[tuple[Any, ...], list[float]]
"""Of the terms of a formula, by the formula's name, their number and the noise levels that it reads."""


class HostCoefficients:
    """To be put in front of `UniPCMultistepScheduler`, whose own formulas it evaluates on unit vectors.

    A schedule is run from its first timestep on, or from where `set_begin_index` says. To whoever saves it, it is a
    scheduler of the library's class.
    """

    _weights: Weights  # of the class: the pipelines copy their scheduler, and the copies share them
    _library: type[UniPCMultistepScheduler]

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        """The next sample (see the base class)."""
        predict = super().multistep_uni_p_bh_update
        if self.solver_p:
            return predict(model_output, sample=sample, order=order)

        def of_units(units: Sequence[Tensor]) -> Tensor:
            return self._with_outputs(units[1:], lambda: predict(units[1], sample=units[0], order=order))

        return self._sum(of_units, [sample, *self._latest(order)], "predict")

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """This sample, corrected (see the base class)."""
        correct = super().multistep_uni_c_bh_update

        def of_units(units: Sequence[Tensor]) -> Tensor:
            return self._with_outputs(
                units[2:],
                lambda: correct(units[1], last_sample=units[0], this_sample=units[0], order=order),
            )

        return self._sum(of_units, [last_sample, this_model_output, *self._latest(order)], "correct")

    def __reduce__(self) -> tuple[Any, ...]:
        # A class that is made at run time cannot be found again by its name.
        return object.__new__, (self._library,), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> HostCoefficients:
        copy = memo[id(self)] = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _init_step_index(self, timestep: Any) -> None:
        # The library looks the timestep up, for which it reads it from the GPU; the pipelines begin with the first.
        self._step_index = self.begin_index or 0

    def _latest(self, order: int) -> list[Tensor]:
        """Converted model outputs that a formula of that order reads, the newest first."""
        return self.model_outputs[: -order - 1 : -1]

    def _with_outputs(self, outputs: Sequence[Tensor], work: Callable[[], Tensor]) -> Tensor:
        kept, self.model_outputs = self.model_outputs, list(reversed(outputs))
        try:
            return work()
        finally:
            self.model_outputs = kept

    def _sum(self, of_units: Callable[[Sequence[Tensor]], Tensor], terms: Sequence[Tensor], name: str) -> Tensor:
        """The weighted sum of the terms that a formula is."""
        near = self.sigmas[max(0, self.step_index - len(terms)) : self.step_index + 2]
        key = (name, len(terms), *near.tolist())
        if key not in self._weights:
            units = torch.eye(len(terms)).unsqueeze(1)  # [terms, 1, terms], as [batch, channels] each
            self._weights[key] = of_units(list(units))[0].tolist()
        first, *others = self._weights[key]
        total = terms[0] * first
        for term, weight in zip(terms[1:], others, strict=True):
            total.add_(term, alpha=weight)
        return total


def with_host_coefficients(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler itself if it is no UniPC, else one of the same settings that gives the same up to rounding."""
    kind = type(scheduler)
    if not isinstance(scheduler, UniPCMultistepScheduler) or isinstance(scheduler, HostCoefficients):
        return scheduler
    # A saved pipeline names the classes of its parts: the library's, which whoever loads it has.
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
    ours = type(kind.__name__, (HostCoefficients, kind), {**names, "_weights": {}, "_library": kind})
    return ours.from_config(scheduler.config)
