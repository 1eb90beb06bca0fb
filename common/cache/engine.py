"""Runs one chunk's step: asks the policy, runs the tokens through the model's blocks, stores what can be reused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.cache.config import MotionCacheConfig
from common.cache.distance import log_snr
from common.cache.policy import FULL, Choice, ChunkState, ChunkStep, Signals, make_policy
from common.cache.residual import ReuseBuffer
from common.cache.trace import Record, Role, StepMaps, Trace

RunBlocks = Callable[[Tensor, Tensor | None], Tensor]


class Engine:
    """The cache of one video in the making. Knows chunks, steps and branches, no model.

    A model's adapter calls `start_window` when a window begins and then, chunk after chunk in causal order,
    `run_blocks` from where the model would run its block stack and `finish` with the model's output.

    Args:
        config: what to cache and when.
        trace: where to record; a new one by default.
    """

    def __init__(self, config: MotionCacheConfig, trace: Trace | None = None) -> None:
        self.config = config
        self.policy = make_policy(config)
        self.trace = trace or Trace()
        self._states: dict[tuple[int, str], ChunkState] = {}
        self._storage = torch.device("cpu") if config.state_device == "cpu" else None
        self._caches = config.method != "exact"
        self._current: tuple[ChunkStep, ChunkState, Signals, Choice, Role, Tensor] | None = None

    @property
    def needs_latents(self) -> bool:
        """Whether `Signals.latents` must be given."""
        return self._caches and self.config.token_level and self.config.score == "latent_motion"

    @property
    def reuses_outputs(self) -> bool:
        """Whether the model's outputs are what is cached, so that `finish` must be given tokens."""
        return self._caches and self.config.reuse == "velocity"

    @property
    def storage(self) -> torch.device | None:
        """Device for K/V and residuals between uses; None is the model's."""
        return self._storage

    def start_window(self) -> None:
        """Forget everything about the chunks before: a new video or window begins."""
        self._states.clear()

    def state(self, chunk: int, branch: str) -> ChunkState:
        """The state of a chunk and branch, made on first use."""
        key = (chunk, branch)
        if key not in self._states:
            cfg = self.config
            order = 0 if cfg.extrapolation == "hold" else 1
            buffer = ReuseBuffer(order, self._storage, track_change=cfg.score == "residual_change")
            self._states[key] = ChunkState(buffer)
        return self._states[key]

    def release(self, chunk: int, branch: str) -> None:
        """Free a finished chunk's residual; only its last frame is still of use, to the chunk after it."""
        state = self._states.get((chunk, branch))
        if state is not None:
            self._states[(chunk, branch)] = ChunkState(ReuseBuffer(), last_frame=state.last_frame)

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
            `[batch, tokens, channels]`. When velocities are reused, rows of reused tokens are not outputs: pass the
            head's result through `finish`.
        """
        state = self.state(step.chunk, step.branch)
        x = signals.inputs
        choice = self.policy.decide(step, state, signals) if role == "denoise" else FULL
        weights = state.weights
        if choice.decision == "full":
            outputs = blocks(x, None)
        else:
            outputs = x.clone() if self.reuses_outputs else x + state.buffer.predict(self._time(step), x.device)
            if choice.tokens is not None:
                outputs[:, choice.tokens] = blocks(x[:, choice.tokens], choice.tokens)
        self._current = (step, state, signals, choice, role, outputs)
        self._record(step, choice, role, weights)
        return outputs

    @torch.no_grad()
    def finish(self, output: Tensor) -> Tensor:
        """Take in the model's output for the chunk that `run_blocks` was last called with.

        Args:
            output: `[batch, tokens, channels]`, the model's head applied to what `run_blocks` returned.

        Returns:
            `[batch, tokens, channels]`: the same, with the rows of reused tokens filled in when velocities are reused.
        """
        step, state, signals, choice, role, outputs = self._current
        self._current = None
        if not self._caches:
            return output
        if role == "refresh":
            self.policy.observe_refresh(step, state, signals, outputs)
            return output
        if self.reuses_outputs:
            values = output
            if choice.decision != "full":
                output = state.buffer.predict(self._time(step), output.device).clone()
                if choice.tokens is not None:
                    output[:, choice.tokens] = values[:, choice.tokens]
        else:
            values = outputs - signals.inputs
        if choice.decision != "reuse":
            tokens = choice.tokens
            state.buffer.store(values if tokens is None else values[:, tokens], self._time(step), tokens)
            if self.config.score == "input_change":
                if tokens is None:
                    state.last_input = signals.inputs.clone()
                else:
                    state.last_input[:, tokens] = signals.inputs[:, tokens]
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

    def _time(self, step: ChunkStep) -> float:
        return step.sigma if self.config.extrapolation == "sigma" else log_snr(step.sigma)


def _maps(record: Record, step: ChunkStep, weights: Tensor | None, tokens: Tensor | None) -> StepMaps:
    computed = torch.full((step.tokens,), record.decision == "full")
    if tokens is not None:
        computed[tokens.cpu()] = True
    w = torch.ones(step.tokens) if weights is None else weights.float().cpu()
    return StepMaps(record, w.view(step.grid), computed.view(step.grid))
