"""What the unmodified pipeline costs, told without running all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from common.generator import Denoised
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import Window


class StockReference:
    """The stock pipeline on one video.

    Args:
        pipe: stock pipeline.
        settings: checked against the model.
        windows: as planned for it.
        iterations: of each window.
    """

    def __init__(self, pipe: Any, settings: RunSettings, windows: Sequence[Window], iterations: Sequence[int]) -> None:
        self.pipe, self.settings, self.windows, self.iterations = pipe, settings, windows, iterations
        self.cost = model_cost(pipe.transformer, settings.max_sequence_length)

    @property
    def wanted(self) -> Literal["full"] | int:
        """How much of it a comparison runs."""
        return self.settings.stock

    def seconds(self, measured: Denoised) -> float:
        """Denoising time of the whole pipeline, from its first iterations without the very first.

        Every iteration of a window costs the stock pipeline the same, and windows cost as their tokens and the squares
        of them: it computes all pairs of tokens and masks some.
        """
        ends = measured.iteration_seconds
        each = (ends[-1] - ends[0]) / (len(ends) - 1)
        first, *_ = sizes = [self.cost.blocks(self._tokens(w), self._tokens(w)) for w in self.windows]
        return sum(each * n * size / first for n, size in zip(self.iterations, sizes, strict=True))

    @property
    def flops(self) -> float:
        """Matrix products of the whole pipeline, attention counted on the block-causal area."""
        flops = 0.0
        for window, iterations in zip(self.windows, self.iterations, strict=True):
            block = self.settings.causal_block_size
            chunks = window.frames // block if block > 1 else 1
            flops += iterations * self._branches * self.cost.window_forward(chunks, self._tokens(window) // chunks)
        return flops

    @property
    def tokens(self) -> int:
        """Tokens that go through the block stack: all of a window, at every iteration and branch."""
        pairs = zip(self.windows, self.iterations, strict=True)
        return sum(n * self._branches * self._tokens(window) for window, n in pairs)

    @property
    def _branches(self) -> int:
        return 2 if self.settings.guided else 1

    def _tokens(self, window: Window) -> int:
        _, rows, columns = self.pipe.transformer.config.patch_size
        factor = self.pipe.vae_scale_factor_spatial
        return window.frames * (self.settings.height // factor // rows) * (self.settings.width // factor // columns)
