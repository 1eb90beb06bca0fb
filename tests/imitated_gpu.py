"""A CUDA device that is none: its tensors are computed by the CPU, but are as strict about where they are as a GPU's.

What would fail on a GPU fails here: tensors of both places in one operation, values that are read without being brought
over, copies that nobody waited for. What comes out is the CPU's, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
FACTS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
READS = {
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.nonzero,
    torch.nonzero,
}
"""What makes the host wait. `tolist` reads as well, and gives no tensor."""
ACROSS = {
    *(Tensor.__getitem__, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as),
    *(torch.promote_types, torch.result_type, Tensor.is_same_size, torch.is_same_size),
    *(torch._has_compatible_shallow_copy_type, Tensor.data.__set__),
}
"""What takes a tensor of either place beside one of the GPU: positions, shapes and dtypes."""
GATHERING = {torch.cat, torch.stack, torch.concat, Tensor.index_select, Tensor.index_copy_, Tensor.gather}
"""What takes not even a single value from the host."""


class OnGpu(Tensor):
    """A tensor on the device; PyTorch sees one of the host with the same values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in FACTS:
            return FACTS[func]
        return ImitatedGpu.at_work.call(func, args, kwargs or {})


class ImitatedGpu(TorchFunctionMode):
    """Inside, `cuda:0` is a device. Use it through `imitated_gpu`.

    Attributes:
        at_work: the one that is.
    """

    at_work: ImitatedGpu

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self._late: list[_Copy] = []  # asynchronous ones that nobody waited for so far
        self._lent: list[_Copy] = []  # those that read from the host's memory meanwhile

    def reach(self, stream: Stream | None, everywhere: bool = True) -> None:
        """The work of a stream, or of all, is done as far as the host knows, or as far as the other streams do."""
        self._finish(lambda copy: stream in (None, copy.stream) and (everywhere or isinstance(copy.there, OnGpu)))

    def _finish(self, done: Callable[[_Copy], bool]) -> None:
        with torch._C.DisableTorchFunction():
            for copy in filter(done, self._late):
                copy.there.copy_(copy.values)
            for copy in filter(done, self._lent):
                assert torch.equal(copy.source, copy.values), "the host wrote where a copy was reading"
        self._late = [copy for copy in self._late if not done(copy)]
        self._lent = [copy for copy in self._lent if not done(copy)]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in FACTS and isinstance(args[0], OnGpu):
            return FACTS[func]
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A function of PyTorch's, as it goes on tensors of the device and of the host."""
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
        if func is Tensor.__deepcopy__ and isinstance(args[0], OnGpu):
            source, memo = args
            return memo.setdefault(id(source), source.clone())
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, args, kwargs)
        if func is Tensor.copy_:
            return self._copied(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and on_gpu:
            raise TypeError("can't convert a tensor of the GPU to numpy; bring it to the host first")
        if func == Tensor.data.__set__:
            self._place(*args)
        if func is torch.mm and "out_dtype" in kwargs:  # a kernel that only GPUs have
            return torch.mm(*(factor.to(kwargs["out_dtype"]) for factor in args))
        if func is Tensor.pin_memory:
            return args[0].clone()
        if on_gpu and func in READS | {Tensor.tolist}:
            self.reach(self.main)
        if on_gpu:
            self._check_places(func, args, given)
        target = kwargs.get("device")
        if target is not None:
            on_gpu = torch.device(target).type == "cuda"
            kwargs = {**kwargs, "device": HOST if on_gpu else target}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        kind = OnGpu if on_gpu else Tensor
        return tree_map(lambda value: _as(kind, value), result)

    def _place(self, parameter: Tensor, data: Tensor) -> None:
        """A parameter goes where its new values are."""
        is_parameter = isinstance(parameter, torch.nn.Parameter)
        if isinstance(data, OnGpu):
            parameter.__class__, parameter._is_param = OnGpu, is_parameter
        elif isinstance(parameter, OnGpu):
            parameter.__class__ = torch.nn.Parameter if is_parameter else Tensor

    def _moved(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        source, *rest = args
        if func is not Tensor.to:
            rest = [HOST if func is Tensor.cpu else GPU]
        wanted = [*rest, kwargs.get("device")]
        target = next((_device(w) for w in wanted if _device(w) is not None), source.device)
        waits = not (kwargs.pop("non_blocking", False) or True in rest[1:])
        rest = [HOST if _device(w) is not None and not isinstance(w, Tensor) else w for w in rest if w is not True]
        if "device" in kwargs:
            kwargs["device"] = HOST
        with torch._C.DisableTorchFunctionSubclass():
            made = Tensor.to(source, *rest, **kwargs)
            crossed = (target.type == "cuda") != isinstance(source, OnGpu)
            if not crossed:
                return made if made is source else _as(type(source), made)
            made = made.clone() if made is source or made.data_ptr() == source.data_ptr() else made
        made = _as(OnGpu if target.type == "cuda" else Tensor, made)
        self._on_its_way(made, source, waits)
        return made

    def _copied(self, there: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        memory = {t.untyped_storage().data_ptr() for t in (there, source) if not isinstance(t, OnGpu)}
        if non_blocking:  # behind the stream's earlier copies
            self._finish(lambda copy: copy.stream is self.current and memory & copy.host_memory)
        with torch._C.DisableTorchFunctionSubclass():
            there.copy_(source)
        if isinstance(there, OnGpu) != isinstance(source, OnGpu):
            self._on_its_way(there, source, not non_blocking)
        return there

    def _on_its_way(self, there: Tensor, source: Tensor, waits: bool) -> None:
        if waits:
            self.reach(self.current)
            return
        with torch._C.DisableTorchFunctionSubclass():
            copy = _Copy(self.current, there, source, there.clone())
            if not isinstance(source, OnGpu):
                self._lent.append(copy)
            if not isinstance(there, OnGpu) or self.current is not self.main:
                self._late.append(copy)
                if there.is_floating_point():
                    there.fill_(float("nan"))

    def _check_places(self, func: Any, args: tuple, given: list[Tensor]) -> None:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and not isinstance(args[0], OnGpu):
            raise RuntimeError("indices of a tensor on the host are on the GPU")
        if func in ACROSS:
            return
        if func is Tensor.__setitem__:
            given = [value for value in args[2:] if isinstance(value, Tensor)]
        for tensor in given:
            if not isinstance(tensor, OnGpu) and (tensor.dim() or func in GATHERING):
                shapes = ", ".join(f"{list(t.shape)} on {'GPU' if isinstance(t, OnGpu) else 'host'}" for t in given)
                raise RuntimeError(f"{func.__name__}: expected all tensors at one place, found {shapes}")


class Stream:
    """Work that is done in the order in which it is given; copies on a stream of their own as late as may be."""

    def __init__(self, device: Any = None) -> None:
        self.device = GPU

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.wait_stream(event.stream)

    def wait_stream(self, stream: Stream) -> None:
        if stream is not self:
            ImitatedGpu.at_work.reach(stream, everywhere=False)

    def synchronize(self) -> None:
        ImitatedGpu.at_work.reach(self)


class Event:
    """A moment in a stream; never passed before it is waited for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or ImitatedGpu.at_work.current

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        ImitatedGpu.at_work.reach(self.stream)

    def elapsed_time(self, end: Event) -> float:
        assert self.stream is end.stream is not None
        return 1.0


@dataclass(eq=False)
class _Copy:
    stream: Stream
    there: Tensor
    source: Tensor
    values: Tensor

    @property
    def host_memory(self) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in (self.there, self.source) if not isinstance(t, OnGpu)}


@contextmanager
def imitated_gpu() -> Iterator[ImitatedGpu]:
    """Inside, CUDA is available."""
    gpu = ImitatedGpu()

    @contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before, gpu.current = gpu.current, stream or gpu.current
        yield
        gpu.current = before

    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "imitated GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(name="imitated GPU", total_memory=80 * 2**30),
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
        "max_memory_allocated": lambda device=None: 2**30,
        "memory_allocated": lambda device=None: 2**30,
        "synchronize": lambda device=None: gpu.reach(None),
        "current_stream": lambda device=None: gpu.current,
        "default_stream": lambda device=None: gpu.main,
        "stream": on,
        "Event": Event,
        "Stream": Stream,
    }
    idle = ("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction")
    replaced |= {name: lambda *args: None for name in (*idle, "ipc_collect")}
    ImitatedGpu.at_work = gpu
    recorded = mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None)
    with mock.patch.multiple(torch.cuda, **replaced), recorded, gpu:
        yield gpu


def _as(kind: type[Tensor], value: Any) -> Any:
    """A tensor as one of the GPU or of the host, the very same tensor if it is one."""
    if not isinstance(value, Tensor) or isinstance(value, OnGpu) == (kind is OnGpu):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(kind)


def _device(value: Any) -> torch.device | None:
    """The device that an argument of `Tensor.to` names, if it names one."""
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, int) and not isinstance(value, bool):
        return GPU
    return torch.device(value) if isinstance(value, (str, torch.device)) else None
