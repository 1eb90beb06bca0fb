"""K/V in main memory with two streams of work that run as far apart as a GPU may let them."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.cache import Compression, KVCache, Staging, Write

CHUNK, LAYERS, HEADS, WIDTH = 4, 5, 2, 4


class Stream:
    """Work in the order in which it was given, none of which is done before somebody needs it."""

    def __init__(self, device=None):
        self._given: list[Callable[[], object]] = []
        self.done = 0

    def put(self, work):
        self._given.append(work)

    def run(self, until=None):
        until = self.given if until is None else until
        while self.done < until:
            self._given[self.done]()
            self.done += 1

    @property
    def given(self):
        return len(self._given)

    def record_event(self):
        return self, self.given

    def wait_event(self, event):
        stream, until = event
        self.put(lambda: stream.run(until))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.run()


class Gpu:
    """A CUDA device that is none, with the model's stream and that of the copies.

    Args:
        copies_first: which of the two gets ahead of the other wherever that does not wait for it.
    """

    def __init__(self, copies_first: bool) -> None:
        self.model, self.copies, self.copies_first = Stream(), Stream(), copies_first
        self.at_work = self.model

    def finish(self):
        for stream in (self.copies, self.model) if self.copies_first else (self.model, self.copies):
            stream.run()

    @contextmanager
    def on(self, stream):
        self.at_work = stream
        with self.writing():
            yield
        self.at_work = self.model

    def writing(self):
        return _Writing(self)


class _Writing(TorchDispatchMode):
    """Inside, what writes into a tensor is put on the stream at work."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten.index_copy_.default):
            return func(*args, **(kwargs or {}))
        if self._gpu.at_work is self._gpu.copies:
            assert args[2] is True, "the host would wait"
        self._gpu.at_work.put(lambda: func(*args))
        return args[0]


@pytest.fixture(params=["copies first", "model first"])
def gpu(monkeypatch, request):
    found, empty = Gpu(request.param == "copies first"), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: found.copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.model)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    return found


CUDA = torch.device("cuda")


def call(cache, write, key, value, query=None, gpu=None):
    """One forward: what each layer attends to; on a GPU, once its streams are finished."""
    seen = []
    for number, layer in enumerate(cache.open(write, key)):
        own = key + number, value - number
        if gpu is None:
            rows = layer.update(*own, write)
            seen.append(torch.cat(rows, dim=-1))
        else:
            with gpu.writing():
                rows = layer.update(*own, write)
            gpu.model.put(lambda rows=rows: seen.append(torch.cat(rows, dim=-1)))
        if query is not None:
            if gpu is not None:
                gpu.model.run()  # keys are looked at
            layer.compress(query, write)
    return seen


@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_neither_stream_overtakes_what_the_other_needs(gpu, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    compression = None if budget is None else Compression(budget, CHUNK, 1)
    here = KVCache(LAYERS, HEADS, WIDTH, compression=compression)
    waiting = KVCache(LAYERS, HEADS, WIDTH, compression=compression, staging=Staging(CUDA))

    seen = []

    def both(*args):
        seen.append((call(here, *args), call(waiting, *args, gpu=gpu)))

    def rows(count):
        return torch.randn(2, 1, count, HEADS, WIDTH, generator=generator).unbind(0)

    for chunk in range(8):
        start = chunk * CHUNK
        both(Write(start, CHUNK, None, max(0, start - 2 * CHUNK)), *rows(CHUNK))
        for step in range(3):  # the chunk before it goes on as well
            for at in (start - CHUNK, start)[chunk == 0 :]:
                tokens = torch.randperm(CHUNK, generator=generator)[: step + 1].sort().values
                both(Write(at, CHUNK, tokens, max(0, at - CHUNK)), *rows(step + 1))
        if chunk:
            clean = Write(start - CHUNK, CHUNK, None, max(0, start - 3 * CHUNK))
            both(clean, *rows(CHUNK), torch.randn(1, CHUNK, HEADS, WIDTH, generator=generator))
            for cache in (here, waiting):
                cache.drop_before(start - 3 * CHUNK)
    gpu.finish()
    for expected, ours in seen:
        assert len(ours) == LAYERS and all(map(torch.equal, ours, expected))
    assert gpu.copies.done > 100 and gpu.model.done > 100


def test_a_layer_does_not_wait_for_the_next_ones_copies(gpu):
    gpu.copies_first = False
    cache = KVCache(LAYERS, HEADS, WIDTH, staging=Staging(CUDA))
    key, value = torch.randn(2, 1, CHUNK, HEADS, WIDTH).unbind(0)
    call(cache, Write(0, CHUNK), key, value, gpu=gpu)
    gpu.finish()
    before, done = gpu.copies.done, []
    for layer in cache.open(Write(CHUNK, CHUNK), key):
        layer.update(key, value, Write(CHUNK, CHUNK))
        gpu.model.put(lambda: done.append(gpu.copies.done - before))
    gpu.model.run()
    first, second, *_ = done
    assert (first, second) == (3, 6)  # behind what the model was given, K and V


def test_looking_does_not_write(gpu):
    cache = KVCache(LAYERS, HEADS, WIDTH, staging=Staging(CUDA))
    key, value = torch.randn(2, 1, CHUNK, HEADS, WIDTH).unbind(0)
    call(cache, Write(0, CHUNK), key, value, gpu=gpu)
    seen = []
    for _ in range(2):
        for layer in cache.look(0, CHUNK):
            found, _ = layer.read(0, CHUNK)
            gpu.model.put(lambda found=found: seen.append(found.clone()))
            gpu.model.put(found.zero_)
    gpu.finish()
    assert all(map(torch.equal, seen, [key + number for number in range(LAYERS)] * 2)) and len(seen) == 2 * LAYERS
