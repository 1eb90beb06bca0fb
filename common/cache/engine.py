"""Runs one chunk's step: asks the policy, runs the tokens through the model's blocks, stores what can be reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from common.attention import without_cudnn
from common.cache.config import MotionCacheConfig
from common.cache.distance import log_snr
from common.cache.policy import (
    FULL,
    Choice,
    ChunkState,
    ChunkStep,
    ExactPolicy,
    MotionCachePolicy,
    Policy,
    Signals,
)
from common.cache.residual import ReuseBuffer
from common.cache.staging import Staging
from common.cache.teacache import TeaCachePolicy
from common.cache.trace import Record, Role, StepMaps, Trace
from common.errors import UserError

RunBlocks = Callable[[Tensor, Tensor | None], Tensor]
POLICIES: dict[str, Callable[[MotionCacheConfig], Policy]] = {
    "exact": lambda config: ExactPolicy(),
    "motioncache": MotionCachePolicy,
    "teacache": TeaCachePolicy,
}


class HoldsMemory(Protocol):
    """A K/V cache, as far as the engine cares."""

    @property
    def bytes(self) -> int: ...


class Engine:
    """The cache of one video in the making. Knows chunks, steps and branches, no model.

    A model's adapter calls `start_window` when a window begins and then, chunk after chunk in causal order,
    `run_blocks` from where the model would run its block stack and `finish` with the model's output. If
    `decides_jointly`, it calls `announce` before the first chunk of an iteration.

    Args:
        config: what to cache and when.
        trace: where to record; a new one by default.
        policy: decides in place of the one that the config names, for instance to measure something. Of the config it
            leaves what is reused and how, and where it is kept.

    Raises:
        UserError: the config measures the time modulation, and no polynomial is known for the model; or a policy is
            given beside `method="exact"`.
    """

    def __init__(self, config: MotionCacheConfig, trace: Trace | None = None, policy: Policy | None = None) -> None:
        if policy is not None and config.method == "exact":
            raise UserError(
                "method: 'exact' keeps nothing that a policy of your own could reuse or learn from; use 'motioncache' "
                "beside it"
            )
        self.config = config
        self.policy = POLICIES[config.method](config) if policy is None else policy
        self.selects_tokens = config.token_level or policy is not None
        """Whether tokens of one chunk may be treated differently: never with `method="exact"`."""
        self.trace = trace or Trace()
        self._watched: list[HoldsMemory] = []
        self._states: dict[tuple[int, str], ChunkState] = {}
        self._caches = config.method != "exact"
        self._current: tuple[ChunkStep, ChunkState, Signals, Choice, Role, Tensor] | None = None

    @property
    def needs_latents(self) -> bool:
        """Whether `Signals.latents` must be given."""
        return self.selects_tokens and self.config.score == "latent_motion"

    @property
    def reuses_outputs(self) -> bool:
        """Whether the model's outputs are what is cached, so that `finish` must be given tokens."""
        return self._caches and self.config.reuse != "residual"

    @property
    def decides_jointly(self) -> bool:
        """Whether `announce` must be called at each iteration."""
        return self.policy.joint

    @property
    def announces_signals(self) -> bool:
        """Whether signals must be given with an announcement."""
        return self.config.distance != "table"

    @property
    def packs_kv(self) -> bool:
        """Whether K/V are to be kept in 8 bits."""
        return self._caches and self.config.kv_dtype == "int8"

    def start_window(self) -> None:
        """Forget everything about the chunks before: a new video or window begins."""
        self._states.clear()
        self._watched.clear()
        self.policy.start_window()

    def watch(self, cache: HoldsMemory) -> None:
        """Count a K/V cache of this window in `memory`."""
        self._watched.append(cache)

    def new_staging(self, device: torch.device) -> Staging | None:
        """What keeps K/V in main memory for a model on `device`; None leaves them where they are."""
        return Staging(device) if self.config.state_device == "cpu" != device.type else None

    def memory(self) -> dict[str, int]:
        """Bytes held now: `kv` of the watched caches, `values` to be reused, `signals` that decisions are made from.

        The trace keeps the peaks. Extrapolation doubles `values`.
        """
        return {
            "kv": sum(cache.bytes for cache in self._watched),
            "values": sum(state.buffer.bytes for state in self._states.values()),
            "signals": sum(state.signal_bytes for state in self._states.values()),
        }

    def state(self, chunk: int, branch: str) -> ChunkState:
        """The state of a chunk and branch, made on first use."""
        key = (chunk, branch)
        if key not in self._states:
            cfg = self.config
            measures = self.selects_tokens and cfg.score == "residual_change"
            order = 0 if cfg.extrapolation == "hold" else 1
            buffer = ReuseBuffer(order, measures_change=measures, weight=cfg.extrapolation_weight)
            self._states[key] = ChunkState(buffer)
        return self._states[key]

    def release(self, chunk: int, branch: str) -> None:
        """Free a finished chunk's memory; only its last frame is still of use, to the chunk after it."""
        self._states.pop((chunk - 1, branch), None)
        state = self._states.get((chunk, branch))
        if state is not None:
            self._states[(chunk, branch)] = ChunkState(ReuseBuffer(), last_frame=state.last_frame)

    @torch.no_grad()
    def announce(self, active: Sequence[tuple[ChunkStep, Signals | None]], group: str) -> None:
        """Tell of all chunks that an iteration is about to denoise.

        Args:
            active: each chunk's step, and what can be measured of it if `announces_signals`.
            group: forwards that are announced together at every iteration, for instance a guidance pass.
        """
        self.policy.announce([(step, self.state(step.chunk, step.branch), signals) for step, signals in active], group)

    @torch.no_grad()
    def run_blocks(self, step: ChunkStep, signals: Signals, blocks: RunBlocks, role: Role = "denoise") -> Tensor:
        """Block-stack outputs of one chunk at one step: computed, reused, or some of each.

        Args:
            step: which chunk, step and branch.
            signals: `signals.inputs` are the tokens that enter the stack.
            blocks: runs the whole stack on `[batch, count, channels]`, given the tokens' indices inside the chunk
                (None for all), and writes their K/V.
            role: `"refresh"` computes everything and leaves the caching state alone.

        Returns:
            `[batch, tokens, channels]`. When the model's outputs are reused, rows of reused tokens are not block-stack
            outputs: pass the head's result through `finish`.
        """
        state = self.state(step.chunk, step.branch)
        x = signals.inputs
        choice = self.policy.decide(step, state, signals) if role == "denoise" else FULL
        weights = state.weights
        if choice.decision == "full":
            outputs = blocks(x, None)
        else:
            outputs = x.clone() if self.reuses_outputs else x + state.buffer.predict(self._time(step))
            if choice.tokens is not None:
                with without_cudnn() if self.config.budget is None else nullcontext():  # nearly every one a new count
                    computed = blocks(_rows(x, choice.tokens), choice.tokens)
                outputs.index_copy_(1, choice.tokens, computed)
        self._current = (step, state, signals, choice, role, outputs)
        self._record(step, choice, role, weights)
        return outputs

    @torch.no_grad()
    def finish(self, output: Tensor) -> Tensor:
        """Take in the model's output for the chunk that `run_blocks` was last called with.

        Args:
            output: `[batch, tokens, channels]`, the model's head applied to what `run_blocks` returned.

        Returns:
            `[batch, tokens, channels]`: the same, with the rows of reused tokens filled in when outputs are reused.

        Raises:
            ValueError: updates are to be reused, and the step has no `dt`.
        """
        output = self._completed(output)
        self.trace.note_memory(self.memory())
        return output

    def _completed(self, output: Tensor) -> Tensor:
        step, state, signals, choice, role, outputs = self._current
        self._current = None
        if not self._caches:
            return output
        if role == "refresh":
            self.policy.observe_refresh(step, state, signals, outputs)
            return output
        tokens = choice.tokens
        computed = _rows(output if self.reuses_outputs else outputs, tokens)
        if self.reuses_outputs:
            scale = self._output_scale(step)
            if choice.decision != "full":
                output = state.buffer.predict(self._time(step)) / scale
                if tokens is not None:
                    output.index_copy_(1, tokens, computed)
        if choice.decision != "reuse":
            inputs = _rows(signals.inputs, tokens)
            values = computed * scale if self.reuses_outputs else computed - inputs
            state.buffer.store(values, self._time(step), tokens)
            if self.selects_tokens and self.config.score == "input_change":
                if tokens is None:
                    state.last_input = inputs.clone()
                else:
                    state.last_input.index_copy_(1, tokens, inputs)
        neighbour = self._states.get((step.chunk - 1, step.branch))
        self.policy.observe(step, state, neighbour, signals, outputs)
        return output

    def _record(self, step: ChunkStep, choice: Choice, role: Role, weights: Tensor | None) -> None:
        computed = {"full": step.tokens, "reuse": 0}.get(choice.decision)
        record = Record(
            window=step.window,
            iteration=step.iteration,
            chunk=step.chunk,
            branch=step.branch,
            step=step.step,
            role=role,
            decision=choice.decision,
            tokens=choice.tokens.numel() if computed is None else computed,
            tokens_total=step.tokens,
            kv_tokens=step.kv_tokens,
        )
        self.trace.records.append(record)
        if self.trace.keep_maps and role == "denoise":
            self.trace.maps.append(_maps(record, step, weights, choice.tokens))

    def _output_scale(self, step: ChunkStep) -> float:
        """What makes a cached value of an output: an update is the output times its own step's size."""
        if self.config.reuse == "velocity":
            return 1.0
        if step.dt is None:
            raise ValueError("reuse 'update' needs a solver whose update is the output times a step size")
        return step.dt

    def _time(self, step: ChunkStep) -> float:
        """Variable of a step over which cached values are extended."""
        return step.sigma if self.config.extrapolation == "sigma" else log_snr(step.sigma)


def _rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Rows of `[batch, tokens, channels]`; None for all."""
    return x if tokens is None else x.index_select(1, tokens)


def _maps(record: Record, step: ChunkStep, weights: Tensor | None, tokens: Tensor | None) -> StepMaps:
    device = None if tokens is None else tokens.device
    computed = torch.full((step.tokens,), record.decision == "full", device=device)
    if tokens is not None:
        computed.index_fill_(0, tokens, True)
    w = torch.ones(step.tokens) if weights is None else weights.to(torch.float32, copy=True)
    return StepMaps(record, w.view(step.grid), computed.view(step.grid))
