"""A GPU that is not there: tensors on PyTorch's meta device stand for tensors on it.

The real code runs, in the real order and at the real size, but nothing is computed. What the host would have to wait
for is counted, and so are kernels and the bytes that cross between host and device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.speed.allocations import Allocations, tensors_in

GPU, HOST = torch.device("meta"), torch.device("cpu")
SMALL = 2**16
"""Bytes up to which a tensor has values: schedules, indices and step counters, by which loops and solvers go."""
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
NO_KERNEL = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty.default, aten.new_empty_strided.default, aten.lift_fresh.default),
}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
"""Operations whose result Python or the host's memory management needs at once."""
PRODUCTS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default, aten.convolution.default}
"""Operations that are bound by arithmetic as a rule, and not by memory."""
PICKS = {aten.index_select.default, aten.index.Tensor, aten.gather.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class PretendedGpu(Allocations):
    """Runs operations on the meta device as if it were a GPU; use it through `benchmarks.speed.fused.pretended`.

    Small tensors keep their values, as long as these follow from the host's, so that loops which read a schedule from
    the device go as they would. Tensors of the host above that size have no values either, and their memory is never
    touched.

    Attributes:
        waits: by place in the source, how often the host would have waited for the device: values that it reads, and
            copies in either direction that are not asked to be asynchronous.
        kernels: operations on the device, views and bare allocations left out.
        moved: bytes that kernels read and write, those of matrix products and attention left out.
        copied: bytes between host and device, both directions.
    """

    def __init__(self, parts: Callable[[], dict[str, int]] = dict) -> None:
        super().__init__("meta", parts)
        self.waits: Counter[str] = Counter()
        self.kernels = self.moved = self.copied = 0
        self._shapes: dict[tuple, Any] = {}
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by storage on the device, the same on the host

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = self._run(func, args, kwargs or {})
        self.take(result, func)
        return result

    # -- where operations run ---------------------------------------------------------------------------------------

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = tensors_in((*args, *kwargs.values()))
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # there is no driver that could pin it
        target = kwargs.get("device")
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta:
            self._crossing(args[1], bool(_argument(args, kwargs, 2, "non_blocking", False)))
            return self._copied_into(args[0], args[1])
        if func is aten._to_copy.default and target is not None and (target.type == "meta") != args[0].is_meta:
            self._crossing(args[0], bool(kwargs.get("non_blocking")))
            return self._copied(args[0], kwargs, target)
        if not any(t.is_meta for t in given):
            return self._on_host(func, args, kwargs, given)
        if func in READS:
            self._wait()
            result = self._read(func, args, kwargs)
            return self._copied(result, {}, GPU) if isinstance(result, Tensor) else result
        if func is aten._linalg_check_errors.default:
            self._wait()
            return None
        if any(not t.is_meta and t.dim() for t in given):  # PyTorch copies it to the device by itself
            self._wait()
        if func in INDEXED:
            args = (args[0], self._positions(args[1]), *args[2:])
        return self._on_gpu(func, args, kwargs, given)

    def _on_gpu(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> Any:
        if func.is_view:
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        result = written[0] if written else self._shaped(func, args, kwargs)
        if not written and _shares_storage(result, given):  # a view that is not declared as one
            return result
        if func not in NO_KERNEL:
            self.kernels += 1
            self.moved += 0 if func in PRODUCTS else _moved(func, given, tensors_in(result))
        if self._computes(func, given, result):
            options = {name: HOST if name == "device" else _map(value, self._value) for name, value in kwargs.items()}
            real = func(*_map(args, self._value), **options)
            if not written:
                for made, values in zip(tensors_in(result), tensors_in(real), strict=True):
                    self._keep(made, values)
        else:
            for tensor in written:
                self._values.pop(tensor.untyped_storage(), None)
        return result

    def _shaped(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation returns, without values. Layers repeat each other, and working out a shape is slow."""
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        if key in self._shapes:
            return _map(self._shapes[key], _Shape.make, _Shape)
        result = func(*args, **kwargs)
        if not _shares_storage(result, tensors_in((*args, *kwargs.values()))):
            self._shapes[key] = _map(result, _Shape.of)
        return result

    def _on_host(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> Any:
        if kwargs.get("device") is not None and kwargs["device"].type == "meta":
            return self._on_gpu(func, args, kwargs, given)
        if func.is_view or not (any(map(_is_large, given)) or _makes_large(func, args, kwargs)):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if written:
            return written[0]
        on_gpu = {"device": GPU} if "device" in kwargs else {}
        shapes = self._shaped(func, _map(args, lambda t: _Shape.of(t).make()), {**kwargs, **on_gpu})
        return _map(shapes, lambda t: _Shape.of(t).make(HOST))

    # -- values -----------------------------------------------------------------------------------------------------

    def _computes(self, func: Any, given: list[Tensor], result: Any) -> bool:
        """Whether an operation's values can be followed; those of an empty tensor are, for the writes to come."""
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(_is_large, tensors_in(result))):
            return False
        return all(not _is_large(t) and (not t.is_meta or t.untyped_storage() in self._values) for t in given)

    def _value(self, tensor: Tensor) -> Tensor:
        """A tensor's values, which later writes to them reach."""
        if not tensor.is_meta:
            return tensor
        storage = self._values[tensor.untyped_storage()]
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)

    def _keep(self, tensor: Tensor, values: Tensor) -> None:
        self._values[tensor.untyped_storage()] = torch.UntypedStorage(tensor.untyped_storage().nbytes())
        self._value(tensor).copy_(values)

    def _known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._values if tensor.is_meta else not _is_large(tensor)

    def _read(self, func: Any, args: tuple, kwargs: dict) -> Any:
        for tensor in tensors_in(args):
            if not self._known(tensor):
                raise RuntimeError(f"{_place()} reads values that depend on what a GPU would have computed")
        return func(*_map(args, self._value), **kwargs)

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Indices in which masks are replaced by what they name; for that the host must learn how many they are."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            self._wait()
            found += [self._copied(p, {}, GPU) for p in self._read(aten.nonzero.default, (index,), {}).unbind(1)]
        return found

    # -- copies -----------------------------------------------------------------------------------------------------

    def _crossing(self, source: Tensor, asynchronous: bool) -> None:
        self.kernels += 1
        self.copied += source.nbytes
        if not asynchronous:
            self._wait()

    def _copied(self, source: Tensor, kwargs: dict, target: torch.device) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        if target == GPU:
            made = torch.empty_like(source, dtype=dtype, device=GPU)
            if not _is_large(made) and self._known(source):
                self._keep(made, source)
            return made
        made = torch.empty_like(source, dtype=dtype, device=HOST)
        if self._known(source):
            made.copy_(self._value(source))
        elif not _is_large(made):
            raise RuntimeError(f"{_place()} reads values that depend on what a GPU would have computed")
        return made

    def _copied_into(self, target: Tensor, source: Tensor) -> Tensor:
        if not self._known(source):
            if target.is_meta:
                self._values.pop(target.untyped_storage(), None)
        elif self._known(target):
            self._value(target).copy_(self._value(source))
        return target

    def _wait(self) -> None:
        self.waits[_place()] += 1


@cache
def _targets(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to; it returns the first."""
    return [_argument(args, kwargs, i, name, None) for i, name in _targets(func)]


def _moved(func: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes."""
    if func in PICKS:  # reads as much of its source as it makes
        return 2 * sum(map(size_of, made))
    if func is aten.index_copy_.default:  # leaves most of its target alone
        return 2 * size_of(given[-1])
    if func is aten.copy_.default:  # does not read its target
        return sum(map(size_of, given))
    return sum(map(size_of, given)) + sum(map(size_of, made))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; values that are repeated by strides are there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def _shares_storage(result: Any, given: list[Tensor]) -> bool:
    storages = {id(tensor.untyped_storage()) for tensor in given}
    return any(id(tensor.untyped_storage()) in storages for tensor in tensors_in(result))


def _is_large(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > SMALL


def _makes_large(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a function without tensors, such as `zeros`, makes a large one."""
    if "device" not in kwargs or tensors_in(args):
        return False
    return any(map(_is_large, tensors_in(func(*args, **{**kwargs, "device": GPU}))))


@dataclass(frozen=True)
class _Shape:
    """All of a tensor but its memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def make(self, device: torch.device = GPU) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def _signature(values: Any) -> Any:
    """What the shape of a result follows from."""
    if isinstance(values, Tensor):
        return values.shape, values.stride(), values.dtype, values.is_meta
    if isinstance(values, (tuple, list)):
        return tuple(map(_signature, values))
    return type(values), values  # 1 and 1.0 are equal and make different dtypes


def _map(values: Any, change: Any, kind: type = Tensor) -> Any:
    """`values` with `change` applied to all tensors in it, or all of another kind."""
    if isinstance(values, kind):
        return change(values)
    return tuple(_map(v, change, kind) for v in values) if isinstance(values, (tuple, list)) else values


def _argument(args: tuple, kwargs: dict, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _place() -> str:
    """File and line that asks: the innermost of this project's models and engine, or of diffusers."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "diffusers" in path.parts and "torch" not in path.parts:
            inside = path.parts[path.parts.index("diffusers") :]
            return f"{'/'.join(inside)}:{frame.f_lineno}"
        if ROOT in path.parents and path.parent.name not in ("speed", "tests") and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
