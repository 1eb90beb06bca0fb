"""Decides, per chunk, step and branch, what is computed: everything, chosen tokens, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.cache import distance, mask, motion
from common.cache.config import MotionCacheConfig
from common.cache.residual import ReuseBuffer
from common.cache.trace import Decision
from common.errors import UserError


@dataclass(frozen=True)
class ChunkStep:
    """What a model's adapter says of one chunk's call.

    Attributes:
        window: window of a long video, from 0.
        iteration: iteration of the sampling loop in that window.
        chunk: chunk in the window, from 0.
        branch: guidance pass, for instance `"cond"`.
        step: denoising step of this chunk, from 0; `num_steps` is how many it gets.
        sigma: noise level of the chunk at this step, 0 (clean) to 1 (noise).
        grid: frames, rows and columns of the chunk's tokens.
        kv_tokens: keys that its queries attend to, its own included.
        dt: factor that the solver puts on the model's output in this step, where its update is just that product (an
            Euler step); None otherwise.
    """

    window: int
    iteration: int
    chunk: int
    branch: str
    step: int
    num_steps: int
    sigma: float
    grid: tuple[int, int, int]
    kv_tokens: int
    dt: float | None = None

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True)
class Signals:
    """What can be measured before anything is computed. Nothing changes these tensors afterwards: they can be kept.

    Attributes:
        inputs: `[batch, tokens, channels]`, the tokens as they enter the block stack.
        modulation: time modulation of the chunk, any shape that is the same at every step; None if the model has none.
        latents: `[batch, tokens, channels * patch]`, the noisy latents cut into patches; None unless asked for.
    """

    inputs: Tensor
    modulation: Tensor | None = None
    latents: Tensor | None = None


@dataclass
class ChunkState:
    """All that is remembered of one chunk and branch. A new window starts with new ones."""

    buffer: ReuseBuffer
    accumulated: Tensor | None = None  # [tokens] A of Eq. 12, float32
    weights: Tensor | None = None  # [tokens] W of Eq. 10, once the token phase has begun
    updates: int = 0  # steps after warm-up that computed something
    since: Tensor | float = 0.0  # Δ summed up since the chunk was last computed, where that decides
    credit: float = 0.0  # share of a whole chunk saved up, in budget form
    previous_signal: Tensor | None = None
    last_input: Tensor | None = None  # [batch, tokens, channels] input of each token when it was last computed
    last_frame: Tensor | None = None  # [batch, rows*columns, channels] features of the last frame at the newest step

    @property
    def signal_bytes(self) -> int:
        """Memory held besides the cached values: what decisions and weights are made from."""
        held = (self.accumulated, self.weights, self.previous_signal, self.last_input, self.last_frame)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


@dataclass(frozen=True)
class Choice:
    """A decision and, for `"select"`, the ascending token indices `[count]`."""

    decision: Decision
    tokens: Tensor | None = None


FULL = Choice("full")
REUSE = Choice("reuse")


Announcement = tuple[ChunkStep, ChunkState, Signals | None]


class Policy(Protocol):
    """A caching method. It sees one chunk's step before it is computed, and the outcome after.

    Attributes:
        joint: whether it must hear of all active chunks of an iteration before it decides on the first.
    """

    joint: bool

    def start_window(self) -> None:
        """A new window or video begins."""

    def announce(self, active: Sequence[Announcement], group: str) -> None:
        """Hear of all chunks that are about to be denoised; called for each iteration if `joint`.

        Args:
            active: the chunks' steps. Signals are None when the config's distance needs none.
            group: forwards that are announced together at every iteration, for instance a guidance pass.
        """

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        """What to compute. May update `state`'s accumulators."""

    def observe(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> None:
        """Learn from the step's block-stack outputs `[batch, tokens, channels]`; `neighbour` is the chunk before."""

    def observe_refresh(self, step: ChunkStep, state: ChunkState, signals: Signals, outputs: Tensor) -> None:
        """Learn from a pass over a clean chunk, which no decision precedes."""


class ExactPolicy:
    """Computes everything and remembers nothing."""

    joint = False

    def start_window(self) -> None:
        pass

    def announce(self, active: Sequence[Announcement], group: str) -> None:
        pass

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        return FULL

    def observe(self, step, state, neighbour, signals, outputs) -> None:
        pass

    def observe_refresh(self, step, state, signals, outputs) -> None:
        pass


def check_distance(config: MotionCacheConfig) -> None:
    """Raise a `UserError` for a config whose `measured_change` lacks a polynomial."""
    if config.distance == "modulation" and config.polynomial is None:
        raise UserError(
            "distance: 'modulation' needs a polynomial and none is known for this model; set polynomial "
            "([1, 0] takes the change as it is), or distance 'input' or 'table'"
        )


def measured_change(config: MotionCacheConfig, active: Sequence[Announcement]) -> Tensor | float:
    """Δ between the last step and this one, of all the given chunks taken together; remembers the signals.

    Chunks that have no last step do not count; without any that has one, Δ is 0.

    Raises:
        ValueError: the config measures a time modulation and the model has none.
    """
    if config.distance == "table":
        entries = [distance.table_entry(config.distance_table, s.step, s.num_steps) for s, _, _ in active]
        return sum(entries) / len(entries)
    pairs = []
    for _, state, signals in active:
        signal = signals.modulation if config.distance == "modulation" else signals.inputs
        if signal is None:
            raise ValueError("this model has no time modulation; use distance 'input' or 'table'")
        previous, state.previous_signal = state.previous_signal, signal
        if previous is not None:
            pairs.append((signal, previous))
    if not pairs:
        return 0.0
    change = distance.joint_relative_l1(pairs)
    return distance.rescale(change, config.polynomial) if config.distance == "modulation" else change


@dataclass
class MotionCachePolicy(ExactPolicy):
    """MotionCache (arXiv 2605.01725), coarse to fine; with α = 1 it stays coarse and is FlowCache's decision.

    Raises:
        UserError: the config measures the time modulation and has no polynomial.
    """

    config: MotionCacheConfig
    _first_chunk: int | None = field(default=None, init=False)  # the first of the window that is denoised
    _led: dict[int, tuple[int, Choice]] = field(default_factory=dict, init=False)  # a chunk's newest shared choice

    def __post_init__(self) -> None:
        check_distance(self.config)

    def start_window(self) -> None:
        self._first_chunk = None
        self._led.clear()

    def decide(self, step: ChunkStep, state: ChunkState, signals: Signals) -> Choice:
        cfg = self.config
        if self._first_chunk is None:  # chunks begin in causal order; given ones are not denoised
            self._first_chunk = step.chunk
        change = measured_change(cfg, [(step, state, signals)])
        if step.step < cfg.warmup_steps or state.accumulated is None:
            # A branch may begin late in a chunk's life (a distilled MAGI-1's second look): it has nothing to reuse yet.
            state.accumulated = torch.zeros(step.tokens, device=signals.inputs.device)
            return FULL
        state.accumulated = state.accumulated + (1.0 if state.weights is None else state.weights) * change
        state.since = state.since + change
        choice = self._choice(step, state)
        if choice.decision != "reuse":
            state.updates += 1
            state.accumulated[slice(None) if choice.tokens is None else choice.tokens] = 0.0
        return choice

    def _choice(self, step: ChunkStep, state: ChunkState) -> Choice:
        """The chunk's own choice, or that of another guidance pass at the same step."""
        iteration, choice = self._led.get(step.chunk, (None, REUSE))
        follows = self.config.shared_selection and state.weights is not None
        if not follows or iteration != step.iteration:
            choice = self._own_choice(step, state)
            if follows:
                self._led[step.chunk] = step.iteration, choice
        if choice.decision == "full":
            state.since = 0.0
        return choice

    def _own_choice(self, step: ChunkStep, state: ChunkState) -> Choice:
        cfg = self.config
        grade = mask.graded(cfg.grading, step.chunk - self._first_chunk)
        if cfg.budget is not None:
            return self._by_budget(step, state, min(cfg.budget / grade, 1.0))
        return self._by_threshold(step, state, cfg.threshold * grade)

    def observe(self, step, state, neighbour, signals, outputs) -> None:
        cfg = self.config
        if self._in_token_phase(step, state):
            scores = self._scores(step, state, neighbour, signals, outputs)
            state.weights = motion.motion_weights(scores, cfg.alpha)
        self._remember_last_frame(step, state, signals, outputs)

    def observe_refresh(self, step, state, signals, outputs) -> None:
        # A denoised chunk keeps the frame of its last noisy step, as in the public code; a given prefix has none.
        if state.last_frame is None:
            self._remember_last_frame(step, state, signals, outputs)

    def _remember_last_frame(self, step: ChunkStep, state: ChunkState, signals: Signals, outputs: Tensor) -> None:
        cfg = self.config
        if cfg.token_level and cfg.score in ("output_motion", "latent_motion"):
            features = signals.latents if cfg.score == "latent_motion" else outputs
            state.last_frame = features[:, -step.grid[1] * step.grid[2] :].clone()

    def _in_token_phase(self, step: ChunkStep, state: ChunkState) -> bool:
        cfg = self.config
        if not cfg.token_level or step.step + 1 < cfg.warmup_steps:
            return False
        reached = state.updates if cfg.chunk_phase_unit == "updates" else step.step + 1
        return reached >= cfg.chunk_phase

    def _by_threshold(self, step: ChunkStep, state: ChunkState, threshold: float) -> Choice:
        cfg = self.config
        if state.weights is None:  # all tokens stand at the same value, which is the host's if a table tells it
            return FULL if bool(state.since >= threshold) else REUSE
        wanted = state.accumulated >= threshold
        if cfg.temporal_vote:
            wanted = mask.temporal_vote(wanted, step.grid[0])
        count = int(wanted.sum())  # the one read from the device
        if count == 0 or count < cfg.min_update_share * step.tokens:
            return REUSE
        count = mask.bucketed(count, cfg.bucket, step.tokens)
        if count == step.tokens:
            return FULL
        return Choice("select", mask.most_urgent(state.accumulated, count, wanted))

    def _by_budget(self, step: ChunkStep, state: ChunkState, budget: float) -> Choice:
        if state.weights is None:
            state.credit += budget
            if state.credit < 1.0 - 1e-9:
                return REUSE
            state.credit -= 1.0
            return FULL
        count = mask.bucketed(max(1, round(budget * step.tokens)), self.config.bucket, step.tokens)
        return FULL if count == step.tokens else Choice("select", mask.most_urgent(state.accumulated, count))

    def _scores(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> Tensor:
        """What the weights are made of, `[frames, tokens per frame]`."""
        cfg = self.config
        if cfg.score == "residual_change":
            scores = state.buffer.change
        elif cfg.score == "input_change":
            last = state.last_input.float()
            moved = (signals.inputs.float() - last).abs().mean(dim=(0, 2))
            scores = moved / (last.abs().mean(dim=(0, 2)) + 1e-8)
        elif cfg.score == "random":
            generator = torch.Generator().manual_seed((step.window << 40) + (step.chunk << 20) + step.step)
            scores = torch.rand(step.tokens, generator=generator).to(signals.inputs.device)
        else:
            previous = neighbour.last_frame if neighbour is not None else None
            if cfg.score == "latent_motion":
                return motion.motion_map(signals.latents, step.grid, previous, relative=False)
            return motion.motion_map(outputs, step.grid, previous, relative=True)
        return scores.view(step.grid[0], -1)
