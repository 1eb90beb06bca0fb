"""Routes MAGI-1's chunk forwards through the caching engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.cache import ChunkStep, Compression, Engine, KVCache, MotionCacheConfig, Signals, Trace, Write
from common.cache.policy import Policy
from common.errors import UserError
from common.patches import to_tokens
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.kv_cache import ChunkView, OwnKeysOnly
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.transformer import PATCH, ChunkInputs, Magi1Transformer3DModel

BRANCHES = (*(branch.value for branch in Pass), Role.NEAR.value)
LEAVE_NO_TRACE = (Role.NEAR.value, Pass.UNCOND.value)
"""Branches whose chunks no other chunk attends to."""


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
        UserError: the config measures a time modulation, which MAGI-1 does not have, or keeps nothing for the policy.
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
        if policy is None:
            check_config(config)
        self.engine = Engine(config, Trace(keep_maps=keep_maps), policy)
        self.engine.start_window()  # a policy may have seen another video
        self._latents: Tensor | None = None  # those that were prepared last
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
        self._latents = latents
        inputs = self._announced.pop(call, None)
        return super().prepare(call, latents) if inputs is None else inputs

    def predict(self, call: ChunkCall, latents: Tensor) -> Tensor:
        """Velocity of one chunk (see `Denoiser`)."""
        with self.engine.trace.timed(latents.device):
            velocity = super().predict(call, latents)
        if call.role in (Role.CLEAN, Role.PREFIX):
            self.caches[call.branch.value].freeze(call.chunk * self._chunk_tokens)
            if call.branch is self.plan.keeping_pass:  # others may leave a clean chunk out
                self._release_clean(call.chunk)
        return velocity

    def _release_clean(self, chunk: int) -> None:
        """Free what all passes still hold of a chunk besides the keys that stay."""
        for branch in BRANCHES:
            self.engine.release(chunk, branch)
        for cache in (self.caches[name] for name in LEAVE_NO_TRACE if name in self.caches):
            cache.drop_before((chunk + 1) * self._chunk_tokens)

    def run_blocks(self, call: ChunkCall, inputs: ChunkInputs) -> Tensor:
        """Block stack outputs of all tokens of the chunk, `[1, tokens, hidden]`: computed, reused, or some of each."""
        step = self._step(call, inputs)
        role = "refresh" if call.role in (Role.CLEAN, Role.PREFIX) else "denoise"

        def blocks(hidden: Tensor, tokens: Tensor | None) -> Tensor:
            chosen = inputs if tokens is None else inputs.select(tokens)
            return self.transformer.run_blocks(chosen, self.keys_values(call, tokens))

        patches = to_tokens(self._latents, (1, PATCH, PATCH)) if self.engine.needs_latents else None
        signals = Signals(inputs.hidden, latents=patches)
        return self.engine.run_blocks(step, signals, blocks, role)

    def keys_values(self, call: ChunkCall, tokens: Tensor | None = None) -> ChunkView | OwnKeysOnly:
        """What the chunk attends to (see `ExactDenoiser`)."""
        # Passes that leave no trace for other chunks still attend to the keys of their own reused tokens.
        if not self.engine.selects_tokens or _branch(call) not in LEAVE_NO_TRACE:
            return super().keys_values(call, tokens)
        start = call.chunk * self._chunk_tokens
        return ChunkView(self.cache(_branch(call)), Write(start, self._chunk_tokens, tokens, seen_from=start))

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache with room for so many rows, as the config wants it."""
        compression = Compression.of(self.engine.config, self._grid)
        staging = self.engine.new_staging(self._latents.device)
        cache = KVCache(*self._sizes, rows, compression, staging, self.engine.packs_kv)
        self.engine.watch(cache)
        return cache

    def _step(self, call: ChunkCall, inputs: ChunkInputs) -> ChunkStep:
        view = self.keys_values(call)
        return ChunkStep(
            window=0,
            iteration=call.iteration,
            chunk=call.chunk,
            branch=_branch(call),
            step=call.step,
            num_steps=self.plan.config.num_steps,
            sigma=1.0 - call.t,  # MAGI's time runs from noise to clean
            grid=inputs.grid,
            kv_tokens=self._chunk_tokens if isinstance(view, OwnKeysOnly) else view.length(),
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
