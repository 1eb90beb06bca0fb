"""How many bytes of tensors are alive on a device, followed operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Peak:
    """The most that was alive at a time.

    Attributes:
        bytes: of all tensors.
        parts: what `Allocations.parts` said at that time.
        largest: bytes by `operation dtype[shape]` that made the tensors, the largest first.
    """

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)


class Allocations(TorchDispatchMode):
    """Counts the storages on one kind of device that operations make inside the context, until they die.

    Views share a storage and in-place operations make none. What is not seen: workspaces inside kernels, the rounding
    and the gaps of an allocator, and whatever PyTorch's C++ code allocates beside an operation's results.

    Args:
        device_type: `"meta"`, `"cpu"` or `"cuda"`.
        parts: asked at each new peak for what is held, in bytes by name.
    """

    SHOWN = 10
    """Entries of `Peak.largest`."""

    def __init__(self, device_type: str, parts: Callable[[], dict[str, int]] = dict) -> None:
        super().__init__()
        self.device_type = device_type
        self.parts = parts
        self.live = 0
        self.peak = Peak()
        self._storages: dict[int, tuple[weakref.ref, int, tuple]] = {}
        self._rising = False  # whether nothing was freed since the peak, so that its tensors are still there

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; the bytes that they add."""
        before = self.live
        self.take(list(tensors), "given")
        return self.live - before

    def largest(self) -> dict[str, int]:
        """See `Peak`; valid after the context has ended."""
        if self._rising:
            self._remember()
        return self.peak.largest

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.take(result, func)
        return result

    def take(self, result: Any, made_by: Any) -> None:
        """Count what an operation returned."""
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._storages or storage.device.type != self.device_type:
                continue
            size = storage.nbytes()
            gone = weakref.ref(storage, partial(self._freed, key))
            self._storages[key] = gone, size, (made_by, tensor.dtype, tensor.shape)
            self.live += size
            if self.live > self.peak.bytes:
                self.peak.bytes, self.peak.parts, self._rising = self.live, self.parts(), True

    def _freed(self, key: int, _: weakref.ref) -> None:
        if self._rising:
            self._remember()
        self.live -= self._storages.pop(key)[1]

    def _remember(self) -> None:
        """Note what the peak consists of."""
        sizes: Counter[tuple] = Counter()
        for _, size, origin in self._storages.values():
            sizes[origin] += size
        self.peak.largest = {
            f"{made_by} {str(dtype).removeprefix('torch.')}{list(shape)}": size
            for (made_by, dtype, shape), size in sizes.most_common(self.SHOWN)
        }
        self._rising = False


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors among an operation's arguments or results, lists included."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []
