"""K/V in main memory with copies that run as late as a GPU may run them."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.cache import Compression, KVCache, Staging, Write

CHUNK, LAYERS, HEADS, WIDTH = 4, 5, 2, 4


class LateStream:
    """A stream of copies, none of which is made before something waits for it."""

    made: list["LateStream"] = []  # noqa: RUF012

    def __init__(self, device=None):
        self.waiting = []
        self.passed = 0
        LateStream.made.append(self)

    def record_event(self):
        return self, self.passed + len(self.waiting)

    def wait_stream(self, other):
        """What the model was given is done: it computes at once here."""

    def synchronize(self):
        self.run(self.passed + len(self.waiting))

    def run(self, until):
        while self.passed < until:
            there, here = self.waiting.pop(0)
            there.copy_(here)
            self.passed += 1


class ModelStream:
    def wait_event(self, event):
        stream, until = event
        stream.run(until)


class Put(TorchDispatchMode):
    """Inside, copies are put on a stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        assert args[2] is True, "the host would wait"
        self.stream.waiting.append(args[:2])
        return args[0]


@pytest.fixture
def late(monkeypatch):
    """A CUDA device that is none."""
    empty = torch.empty

    @contextmanager
    def on(stream):
        with Put(stream):
            yield

    monkeypatch.setattr(LateStream, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", LateStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ModelStream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    return torch.device("cuda")


def call(cache, write, key, value, query=None):
    """One forward: what each layer attends to."""
    seen = []
    for number, layer in enumerate(cache.open(write, key)):
        rows = layer.update(key + number, value - number, write)
        seen.append(torch.cat(rows, dim=-1))
        if query is not None:
            layer.compress(query, write)
    return seen


@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_late_copies_change_nothing(late, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    compression = None if budget is None else Compression(budget, CHUNK, 1)
    here = KVCache(LAYERS, HEADS, WIDTH, compression=compression)
    waiting = KVCache(LAYERS, HEADS, WIDTH, compression=compression, staging=Staging(late))

    def both(*args):
        for ours, expected in zip(call(waiting, *args), call(here, *args), strict=True):
            assert torch.equal(ours, expected)

    def rows(count):
        return torch.randn(2, 1, count, HEADS, WIDTH, generator=generator).unbind(0)

    for chunk in range(8):
        start = chunk * CHUNK
        both(Write(start, CHUNK, None, None, max(0, start - 2 * CHUNK)), *rows(CHUNK))
        for step in range(3):  # the chunk before it goes on as well
            for at in (start - CHUNK, start)[chunk == 0 :]:
                tokens = torch.randperm(CHUNK, generator=generator)[: step + 1].sort().values
                both(Write(at, CHUNK, tokens, None, max(0, at - CHUNK)), *rows(step + 1))
        if chunk:
            clean = Write(start - CHUNK, CHUNK, None, None, max(0, start - 3 * CHUNK))
            both(clean, *rows(CHUNK), torch.randn(1, CHUNK, HEADS, WIDTH, generator=generator))
            for cache in (here, waiting):
                cache.drop_before(start - 3 * CHUNK)
    assert sum(stream.passed for stream in LateStream.made) > 100


def test_looking_does_not_write(late):
    cache = KVCache(LAYERS, HEADS, WIDTH, staging=Staging(late))
    key, value = torch.randn(2, 1, CHUNK, HEADS, WIDTH).unbind(0)
    call(cache, Write(0, CHUNK), key, value)
    for _ in range(2):
        for number, layer in enumerate(cache.look(0, CHUNK)):
            found, _ = layer.read(0, CHUNK)
            assert torch.equal(found, key + number)
            found.zero_()
