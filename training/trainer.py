"""One training loop for every model of `assets/`: a schedule over wall-clock time, EMA weights, checkpoints, a log.

A model brings a `Task`; the loop knows nothing of video, captions or noise.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from training.muon import BatchedMuon
from training.parallel import reduce_gradients, world_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    minutes: float
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.03
    """Share of the budget in which the learning rate rises."""
    flat: float = 0.0
    """Share of the budget after the warm-up before the learning rate falls, by a cosine, to zero."""
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    muon: bool = False
    checkpoint_minutes: float = 5.0
    log_steps: int = 20
    autocast: bool = False
    """bfloat16 autocast, for GPUs; on a CPU without matrix units it is slower than float32."""


class Task(Protocol):
    """What the loop needs to know of a model."""

    model: torch.nn.Module
    """All trained weights, on their device."""

    def loss(self, step: int, progress: float, rank: int, world: int) -> torch.Tensor:
        """Make this process's batch of a step and return its scalar loss; `progress` is in [0, 1]."""

    def is_hidden_matrix(self, name: str) -> bool:
        """Return whether Muon may train this parameter: a hidden matrix or kernel, not an embedding or an end layer."""


def learning_rate_share(progress: float, warmup: float, flat: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: a linear rise, a plateau, a cosine to zero."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    fall = max(0.0, progress - warmup - flat) / (1 - warmup - flat)
    return 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


def build_optimizers(task: Task, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest."""
    named = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if config.muon and p.ndim > 1 and task.is_hidden_matrix(n)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    decayed, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))]
    if hidden:
        optimizers.append(BatchedMuon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay))
    return optimizers


class Ema:
    """Exponential moving average of a model's weights, with a shorter memory in the first steps."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards `model`'s weights after optimisation step `step` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = self.model.state_dict(), model.state_dict()
        for name, value in mine.items():
            if value.is_floating_point():
                value.lerp_(theirs[name], 1 - decay)
            else:
                value.copy_(theirs[name])


def train(
    task: Task,
    config: TrainConfig,
    folder: Path,
    name: str,
    rank: int = 0,
    on_checkpoint: Callable[[torch.nn.Module, dict], None] | None = None,
) -> torch.nn.Module:
    """Train until the time is spent; resumes from `folder/name.pt` if it exists.

    Args:
        task: the model and its loss.
        config: schedule; time spent before a resume counts.
        folder: where `name.pt` and the log `name.jsonl` go.
        rank: this process's number; only process 0 writes.
        on_checkpoint: called by process 0 with the EMA model and the last log record after each checkpoint.

    Returns:
        The EMA model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
    ema = Ema(task.model, config.ema_decay)
    optimizers = build_optimizers(task, config)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        task.model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        step, spent = state["step"], state["spent"]
        logger.info("resumed %s at step %d after %.1f min", name, step, spent / 60)
    elif rank == 0:
        count = sum(p.numel() for p in parameters)
        log_path.write_text(
            json.dumps({"config": asdict(config), "parameters": count, "processes": world_size()}) + "\n"
        )
    begin = time.monotonic() - spent
    last_checkpoint, losses, progress = time.monotonic(), [], spent / (60 * config.minutes)
    device = next(task.model.parameters()).device
    task.model.train()
    while progress < 1:
        share = learning_rate_share(progress, config.warmup, config.flat)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * share
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            loss = task.loss(step, progress, rank, world_size())
        loss.backward()
        spent = time.monotonic() - begin
        mean_loss, progress = reduce_gradients(
            parameters, loss.item(), spent / (60 * config.minutes) if rank == 0 else 0.0
        )
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(task.model, step)
        step += 1
        losses.append(mean_loss)
        if rank:
            continue
        if step % config.log_steps == 0 or progress >= 1:
            record = {
                "step": step,
                "minutes": round(spent / 60, 2),
                "loss": round(sum(losses) / len(losses), 5),
                "grad_norm": round(norm, 3),
                "learning_rate": config.learning_rate * share,
            }
            losses = []
            with log_path.open("a") as log:
                log.write(json.dumps(record) + "\n")
        if time.monotonic() - last_checkpoint > 60 * config.checkpoint_minutes or progress >= 1:
            last_checkpoint = time.monotonic()
            state = {
                "model": task.model.state_dict(),
                "ema": ema.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "spent": spent,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            if on_checkpoint is not None:
                on_checkpoint(ema.model, {"step": step, "minutes": round(spent / 60, 2)})
    return ema.model
