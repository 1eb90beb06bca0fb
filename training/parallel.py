"""Data parallelism over single-threaded CPU processes: one process per core, gradients averaged after each step.

On a CPU, several one-thread processes waste less time than one process with several threads on tensors this small.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(worker: Callable[..., None], processes: int, *args: object) -> None:
    """Run `worker(rank, *args)` in `processes` processes joined in one gloo group, or here if `processes` is 1."""
    if processes == 1:
        worker(0, *args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    level = logging.getLogger().getEffectiveLevel()
    mp.start_processes(_entry, args=(processes, port, level, worker, args), nprocs=processes, start_method="spawn")


def _entry(rank: int, world: int, port: int, log_level: int, worker: Callable[..., None], args: tuple) -> None:
    logging.basicConfig(level=log_level, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    os.nice(5)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        worker(rank, *args)
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_gradients(parameters: Sequence[torch.nn.Parameter], loss: float, progress: float) -> tuple[float, float]:
    """Average gradients over processes in place, in one message.

    Args:
        parameters: the trained parameters, in the same order in each process; a missing gradient counts as zero.
        loss: this process's loss.
        progress: share of the time budget used, as the first process sees it; other processes pass 0.

    Returns:
        The mean loss and the first process's progress, so that every process follows the same schedule.
    """
    if world_size() == 1:
        return loss, progress
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads] + [grads[0].new_tensor([loss, progress])])
    dist.all_reduce(flat)
    mean_loss, first_progress = (flat[-2] / world_size()).item(), flat[-1].item()
    offset = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[offset : offset + grad.numel()].view_as(grad) / world_size()
        offset += grad.numel()
    return mean_loss, first_progress
