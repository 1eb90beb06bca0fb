"""What was computed last for every token of a chunk, and what a reused token gets from it."""

from __future__ import annotations

import torch
from torch import Tensor


class ReuseBuffer:
    """Cached values of one chunk and branch: held, or extended linearly over a time variable.

    The value may be the residual of the block stack, the model's output or the update made from it: the buffer does not
    care. Tokens are computed at different steps, so each has its own times.

    Args:
        order: 0 keeps one value per token, 1 keeps two and extrapolates.
        measures_change: whether `change` keeps each token's relative L1 change between its last two computations.
        weight: share of the extrapolated change that counts.
    """

    def __init__(
        self,
        order: int = 0,
        measures_change: bool = False,
        weight: float = 1.0,
    ) -> None:
        self.order = order
        self.measures_change = measures_change
        self.weight = weight
        self.last: Tensor | None = None
        self.before: Tensor | None = None
        self.last_time: Tensor | None = None
        self.before_time: Tensor | None = None
        self.change: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory held, in bytes: one value per token, or two to extrapolate from."""
        held = (self.last, self.before, self.last_time, self.before_time, self.change)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def store(self, values: Tensor, time: float, tokens: Tensor | None = None) -> None:
        """Remember freshly computed values.

        Args:
            values: `[batch, tokens, channels]`, all of the chunk's tokens, or those named by `tokens`.
            time: time variable of this step.
            tokens: `[count]` indices, or None for all.

        Raises:
            RuntimeError: a selection is stored before the whole chunk ever was.
        """
        if tokens is None:
            self._store_all(values, time)
            return
        if self.last is None or self.last_time is None:
            raise RuntimeError("a chunk's first stored step must cover all its tokens")
        if self.measures_change:
            self.change[tokens] = _relative_change(values, self.last[:, tokens])
        if self.order:
            if self.before is None:  # only now does any token have two measurements
                self.before, self.before_time = self.last.clone(), self.last_time.clone()
            self.before.index_copy_(1, tokens, self.last.index_select(1, tokens))
            self.before_time[tokens] = self.last_time[tokens]
        self.last.index_copy_(1, tokens, values)
        self.last_time.index_fill_(0, tokens, time)

    def _store_all(self, values: Tensor, time: float) -> None:
        if self.measures_change:
            unknown = torch.zeros(values.shape[1], device=values.device)
            self.change = unknown if self.last is None else _relative_change(values, self.last)
        if self.order:
            self.before, self.before_time = self.last, self.last_time
        self.last = values
        self.last_time = torch.full((values.shape[1],), time, device=values.device)

    def predict(self, time: float) -> Tensor:
        """The chunk's values at `time`, `[batch, tokens, channels]`; a value that is held is not a copy.

        First order is Taylor's: last + weight·slope·(time - last_time), per token; a token measured once is held.
        """
        if self.last is None or self.last_time is None:
            raise RuntimeError("nothing was computed yet that could be reused")
        if self.before is None:
            return self.last
        span = self.last_time - self.before_time
        ratio = torch.where(span.abs() > 1e-12, (time - self.last_time) / span, torch.zeros_like(span))
        place = (1 + self.weight * ratio).to(self.last.dtype)[None, :, None]
        return torch.lerp(self.before, self.last, place)


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Per token: mean |new - old| over mean |old|, `[tokens]` float32."""
    old = old.float()
    return (new.float() - old).abs().mean(dim=(0, 2)) / (old.abs().mean(dim=(0, 2)) + 1e-8)
