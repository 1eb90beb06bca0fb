"""Routes MAGI-1's chunk forwards through the caching engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from common.cache import ChunkStep, Compression, Engine, MotionCacheConfig, Signals, Trace
from common.cache.kv_line import KeyValueLine
from common.cache.policy import Policy
from common.errors import UserError
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.kv_cache import ChunkKVCache, ChunkKVView, ExtendedKeys, OwnKeysOnly
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
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
        policy: decides in place of the one that the config names.

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
        policy: Policy | None = None,
    ) -> None:
        super().__init__(transformer, captions, plan)
        check_config(config)
        self.engine = Engine(config, Trace(keep_maps=keep_maps), policy)
        self._lines: dict[str, KeyValueLine] = {}
        self._own: dict[str, ChunkKVCache] = {}
        if config.token_level or policy is not None:
            # Passes that leave no trace for other chunks still attend to the keys of their own reused tokens.
            self._own = {branch: ChunkKVCache() for branch in (Pass.UNCOND.value, Role.NEAR.value)}
        for cache in (*self.caches.values(), *self._own.values()):
            cache.storage = self.engine.storage
            self.engine.watch(cache)
        self._latents: Tensor | None = None
        self._announced: dict[ChunkCall, ChunkInputs] = {}

    @property
    def trace(self) -> Trace:
        """What was computed."""
        return self.engine.trace

    def start_iteration(self, calls: Sequence[ChunkCall], latents: Sequence[Tensor]) -> None:
        """Tell a policy that decides jointly of all chunks that are being denoised.

        A nearly-clean copy follows the decision without a say in it: it has the latents of a chunk that has one.
        """
        if not self.engine.decides_jointly:
            return
        self._announced = {call: self.prepare(call, x) for call, x in zip(calls, latents, strict=True)}
        active = [(call, inputs) for call, inputs in self._announced.items() if call.role is Role.DENOISE]
        self.engine.announce([(self._step(call, inputs), Signals(inputs.hidden)) for call, inputs in active], "all")

    def prepare(self, call: ChunkCall, latents: Tensor) -> ChunkInputs:
        """What enters the block stack (see `ExactDenoiser`), once per forward."""
        inputs = self._announced.pop(call, None)
        return super().prepare(call, latents) if inputs is None else inputs

    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`)."""
        self._latents = latents
        with self.engine.trace.timed(latents.device):
            velocity = super().predict(call, latents)
        if call.role in (Role.CLEAN, Role.PREFIX):
            for branch in (call.branch.value, Role.NEAR.value, Pass.UNCOND.value):
                self.engine.release(call.chunk, branch)
            for cache in self._own.values():
                cache.drop_before(call.chunk + 1)
            for line in self._lines.values():
                line.release(call.chunk)
        return velocity

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk, `[1, tokens, hidden]`: computed, reused, or some of each."""
        for cache in self.caches.values():  # the size of a chunk is first known here
            cache.compression = Compression.of(self.engine.config, inputs.grid)

        def blocks(hidden: Tensor, index: Tensor | None) -> Tensor:
            chosen = inputs if index is None else inputs.select(index)
            return self.transformer.run_blocks(chosen, self._extended(step, call, index))

        signals = Signals(inputs.hidden, latents=_patches(self._latents) if self.engine.needs_latents else None)
        role = "refresh" if call.role in (Role.CLEAN, Role.PREFIX) else "denoise"
        step = self._step(call, inputs)
        return self.engine.run_blocks(step, signals, blocks, role)

    def _extended(self, step: ChunkStep, call: ChunkCall, rows: Tensor | None) -> ChunkKVView | OwnKeysOnly:
        """`keys_values`, with those of tokens that are not run extended where the config says so."""
        seen = self.keys_values(call, rows)
        if step.branch not in self._lines:
            line = self.engine.new_line()
            if line is None:
                return seen
            self._lines[step.branch] = line
        if call.role in (Role.CLEAN, Role.PREFIX):
            return seen
        return replace(seen, extended=ExtendedKeys(self._lines[step.branch], call.chunk, self.engine.time(step), rows))

    def keys_values(self, call: ChunkCall, rows: Tensor | None = None) -> ChunkKVView | OwnKeysOnly:
        """What the chunk attends to (see `ExactDenoiser`)."""
        cache = self._own.get(_branch(call))
        if cache is None:
            return super().keys_values(call, rows)
        return ChunkKVView(cache, cache, call.chunk, start=call.chunk, own_from=call.chunk, rows=rows)

    def _step(self, call: ChunkCall, inputs: ChunkInputs) -> ChunkStep:
        return ChunkStep(
            window=0,
            iteration=call.iteration,
            chunk=call.chunk,
            branch=_branch(call),
            step=call.step,
            num_steps=self.plan.config.num_steps,
            sigma=1.0 - call.t,  # MAGI's time runs from noise to clean
            grid=inputs.grid,
            kv_tokens=self.keys_values(call).length(inputs.hidden.shape[1]),
            dt=call.dt,
        )

    def finish(self, call: ChunkCall, inputs: ChunkInputs, hidden: Tensor) -> Tensor:
        """Velocity `[1, channels, frames, height, width]` from the block stack's outputs."""
        return self.transformer.unpatchify(self.engine.finish(self.transformer.head(hidden)), inputs.grid)


def _branch(call: ChunkCall) -> str:
    """What decides, and keeps residuals, apart from the others."""
    return Role.NEAR.value if call.role is Role.NEAR else call.branch.value


def check_config(config: MotionCacheConfig) -> None:
    """Raise a `UserError` for a config that measures a time modulation, which MAGI-1 does not have."""
    if config.method != "exact" and config.distance == "modulation":
        raise UserError("distance: 'modulation' is not allowed, MAGI-1 has no time modulation; use 'input' or 'table'")


def _patches(latents: Tensor) -> Tensor:
    """`[batch, channels, frames, height, width]` cut into the model's patches, `[batch, tokens, channels * 4]`."""
    x = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
