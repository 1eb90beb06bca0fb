"""Routes MAGI-1's chunk forwards through the caching engine."""

from __future__ import annotations

from torch import Tensor

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals, Trace
from common.errors import UserError
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.plan import ChunkCall, Role, SamplingPlan
from magi1_motioncache.transformer import PATCH, ChunkInputs, Magi1Transformer3DModel


class CachedDenoiser(ExactDenoiser):
    """Answers the sampler's forwards with an engine between the embedding and the block stack.

    The clean pass over a finished chunk, and given chunks, are always computed: their K/V stay for the rest of the
    video. A distilled model's nearly-clean copy sees other keys than the chunk that it copies, so its residual or
    velocity is its own: it decides as a branch of its own.

    Args:
        transformer, captions, plan: as for `ExactDenoiser`.
        config: what to cache.
        keep_maps: keep weights and masks of every step in the trace, for pictures.

    Raises:
        UserError: the config measures a time modulation, which MAGI-1 does not have.
    """

    def __init__(
        self,
        transformer: Magi1Transformer3DModel,
        captions: ChunkCaptions,
        plan: SamplingPlan,
        config: MotionCacheConfig,
        keep_maps: bool = False,
    ) -> None:
        super().__init__(transformer, captions, plan)
        if config.method != "exact" and config.distance == "modulation":
            raise UserError(
                "distance: 'modulation' is not allowed, MAGI-1 has no time modulation; use 'input' or 'table'"
            )
        self.engine = Engine(config, Trace(keep_maps=keep_maps))
        self._latents: Tensor | None = None

    @property
    def trace(self) -> Trace:
        """What was computed."""
        return self.engine.trace

    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`)."""
        self._latents = latents
        with self.engine.trace.timed(latents.device):
            velocity = super().predict(call, latents)
        if call.role in (Role.CLEAN, Role.PREFIX):
            for branch in (call.branch.value, Role.NEAR.value):
                self.engine.release(call.chunk, branch)
        return velocity

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk, `[1, tokens, hidden]`: computed, reused, or some of each."""
        tokens = inputs.hidden.shape[1]
        step = ChunkStep(
            window=0,
            iteration=call.iteration,
            chunk=call.chunk,
            branch=Role.NEAR.value if call.role is Role.NEAR else call.branch.value,
            step=call.step,
            num_steps=self.plan.config.num_steps,
            sigma=1.0 - call.t,  # MAGI's time runs from noise to clean
            grid=inputs.grid,
            kv_tokens=call.kv_chunks * tokens,
        )

        def blocks(hidden: Tensor, index: Tensor | None) -> Tensor:
            chosen = inputs if index is None else inputs.select(index)
            return self.transformer.run_blocks(chosen, self.keys_values(call, rows=index))

        signals = Signals(inputs.hidden, latents=_patches(self._latents) if self.engine.needs_latents else None)
        role = "refresh" if call.role in (Role.CLEAN, Role.PREFIX) else "denoise"
        return self.engine.run_blocks(step, signals, blocks, role)

    def finish(self, call: ChunkCall, inputs: ChunkInputs, hidden: Tensor) -> Tensor:
        """Velocity `[1, channels, frames, height, width]` from the block stack's outputs."""
        return self.transformer.unpatchify(self.engine.finish(self.transformer.head(hidden)), inputs.grid)


def _patches(latents: Tensor) -> Tensor:
    """`[batch, channels, frames, height, width]` cut into the model's patches, `[batch, tokens, channels * 4]`."""
    x = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
