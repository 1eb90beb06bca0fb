"""How fast each attention kernel is at a model's shapes, and which one to take."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import is_flash_attn_available

from benchmarks.speed.failures import first_line
from benchmarks.speed.instruments import Clock, best_rate
from common.attention import attend, without_cudnn

DEFAULT = "default"
"""What `common.attention.attend` takes by itself: flash-attn where it is installed, else PyTorch's own choice."""
MASKED = "default without cuDNN"
"""What stock runs with, as a run's stock stage does: PyTorch's choice among kernels that take its mask."""
ON_GPU = (DEFAULT, "_native_flash", "_native_cudnn")
"""Kernels to choose from, by their names in diffusers."""
GAIN = 1.05
"""A kernel is taken in place of the default if it is that much faster."""
LAYOUTS = ("by head", "by row")
"""Whether a head's rows of K/V are side by side in memory, as on the model's device, or a row's heads, as elsewhere."""
PROMPT_KEYS = 102
"""Keys of a short prompt. Of no round number, which a kernel may refuse."""

REPEATS = 5

Rate = dict[str, Any]


def attention_rates(clock: Clock, shape: tuple[int, int, int, int]) -> list[Rate]:
    """FLOP/s of unmasked bf16 attention by kernel: whole chunks and a quarter of their queries, in both layouts.

    Args:
        clock: of the device.
        shape: queries, keys, heads and head size of a whole chunk.

    Returns:
        Per kernel, layout and number of queries and keys its `tflops`, or the `error` that it gave instead.
    """
    queries, keys, heads, width = shape
    sizes = [(queries, keys), (queries // 4, keys), (queries // 4, PROMPT_KEYS)]
    found: list[Rate] = []
    for name in available(clock.device):
        for layout in LAYOUTS:
            for size in sizes:
                rate: Rate = {"kernel": name, "layout": layout, "queries": size[0], "keys": size[1]}
                try:
                    rate["tflops"] = _rate(clock, name, *size, heads, width, layout) / 1e12
                except Exception as error:  # kernels refuse devices and shapes in many ways; which, is the result
                    rate["error"] = first_line(error)
                found.append(rate)
    return found


def available(device: torch.device) -> tuple[str, ...]:
    """Kernels to choose from; a CPU has one."""
    return ON_GPU if device.type == "cuda" else (DEFAULT,)


def fastest(rates: list[Rate]) -> str:
    """The kernel to run with: the fastest over whole and quartered chunks, if it clearly beats the default.

    One that refused any shape is out. Where flash-attn is installed there is no choice: `attend` takes it whatever
    diffusers' active backend is.
    """
    if is_flash_attn_available():
        return DEFAULT
    refused = {rate["kernel"] for rate in rates if "error" in rate}
    longest = max(rate["keys"] for rate in rates)
    at_work = [r for r in rates if r["kernel"] not in refused and r["layout"] == LAYOUTS[0] and r["keys"] == longest]
    names = {rate["kernel"] for rate in at_work}
    speed = {n: math.prod(r["tflops"] for r in at_work if r["kernel"] == n) ** 0.5 for n in names}  # geometric mean
    if DEFAULT not in speed:
        return DEFAULT
    best = max(speed, key=speed.__getitem__)
    return best if speed[best] > GAIN * speed[DEFAULT] else DEFAULT


def using(name: str) -> AbstractContextManager[None]:
    """Inside, attention runs with the kernel of that name."""
    if name == MASKED:
        return without_cudnn()
    return nullcontext() if name == DEFAULT else attention_backend(AttentionBackendName(name))


def whole_rate(rates: list[Rate], name: str) -> float | None:
    """FLOP/s of whole chunks with a kernel, in the layout on the model's device; None if it failed."""
    most = max(rate["queries"] * rate["keys"] for rate in rates)
    for rate in rates:
        if rate["kernel"] == name and rate["layout"] == LAYOUTS[0] and rate["queries"] * rate["keys"] == most:
            return rate["tflops"] * 1e12 if "tflops" in rate else None
    return None


def _rate(clock: Clock, name: str, queries: int, keys: int, heads: int, width: int, layout: str) -> float:
    backend = None if name == DEFAULT else AttentionBackendName(name)
    kind = {"device": clock.device, "dtype": torch.bfloat16}
    query = torch.randn(1, queries, heads, width, **kind)
    rows = keys + queries  # a chunk that is not the last attends to a part of what is stored
    if layout == LAYOUTS[0]:
        key, value = (torch.randn(1, heads, rows, width, **kind).transpose(1, 2)[:, :keys] for _ in range(2))
    else:
        key, value = (torch.randn(1, rows, heads, width, **kind)[:, :keys] for _ in range(2))
    return best_rate(clock, lambda: attend(query, key, value, backend), 4.0 * queries * keys * heads * width, REPEATS)
