"""K/V of a pass: writes, reads, what is dropped, and the same with K/V that wait in main memory."""

import pytest
import torch

from common.cache import Compression, KVCache, Staging, Write
from common.cache.eight_bit import pack, unpack

CPU = torch.device("cpu")


@pytest.fixture(params=["here", "waiting"])
def make(request):
    """Makes a cache, on the model's device or in main memory."""
    return lambda layers, rows=None, width=4, **kwargs: KVCache(
        layers, 2, width, rows, **kwargs, staging=Staging(CPU) if request.param == "waiting" else None
    )


def write(cache, at, *rows):
    """What each layer returns when it is given K and V; layer n gets them times n + 1."""
    found = []
    for number, layer in enumerate(cache.open(at, rows[0])):
        found.append(tuple(x.clone() for x in layer.update(*(row * (number + 1) for row in rows), at)))
    return found


def random_rows(count=8):
    return torch.randn(2, 1, count, 2, 4).unbind(0)


def test_whole_and_selected_writes(make):
    cache = make(layers=3, rows=16)
    k, v = random_rows()
    write(cache, Write(0, 8), k, v)
    for number, (keys, _) in enumerate(write(cache, Write(8, 8), k * 2, v * 2)):
        torch.testing.assert_close(keys, torch.cat([k, k * 2], dim=1) * (number + 1))
    tokens = torch.tensor([1, 6])
    expected = torch.cat([v, v * 2], dim=1)
    expected[:, 8 + tokens] = v[:, tokens] * 5
    for number, (_, values) in enumerate(write(cache, Write(8, 8, tokens), k[:, tokens] * 5, v[:, tokens] * 5)):
        torch.testing.assert_close(values, expected * (number + 1))
    assert cache.bytes == 3 * 2 * 16 * 2 * 4 * 4
    for number, layer in enumerate(cache.look(4, 16)):
        torch.testing.assert_close(layer.read(4, 16)[1], expected[:, 4:] * (number + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_read_as_they_were_given_up_to_rounding(make, dtype):
    cache, plain = make(layers=2, rows=16, packed=True), make(layers=2, rows=16)
    k, v = (rows.to(dtype) * 3 for rows in random_rows())
    tokens = torch.tensor([1, 6])
    for at in (Write(0, 8), Write(8, 8), Write(8, 8, tokens), Write(8, 8, seen_from=8)):
        given = (k, v) if at.tokens is None else (k[:, tokens] * 5, v[:, tokens] * 5)
        for ours, expected in zip(write(cache, at, *given), write(plain, at, *given), strict=True):
            for rows, exact in zip(ours, expected, strict=True):
                assert rows.dtype == dtype and rows.shape == exact.shape
                error = (rows - exact).abs().amax(-1) / exact.abs().amax(-1)
                assert 0 < error.max() < (0.0044 if dtype == torch.float32 else 0.009)
    assert cache.bytes == 2 * 2 * 16 * 2 * (4 + 1)
    (older, _), (exact, _) = (next(iter(one.look(0, 8))).read(0, 8) for one in (cache, plain))
    torch.testing.assert_close(older, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 1e6])
def test_a_row_of_any_size_can_be_packed(size):
    rows = torch.tensor([[-1.0, 0.5, 0.25, 0.0]]) * size
    packed = pack(rows)
    assert packed.dtype == torch.int8 and packed.shape == (1, 5)
    torch.testing.assert_close(unpack(packed, torch.float32), rows, rtol=0, atol=max(0.0043 * size, 2**-17))


def test_earlier_tokens_are_left_out(make):
    cache = make(layers=2)
    k, v = random_rows(12)
    for start in (0, 4):
        write(cache, Write(start, 4), k[:, start : start + 4], v[:, start : start + 4])
    for number, (keys, _) in enumerate(write(cache, Write(8, 4, seen_from=4), k[:, 8:], v[:, 8:])):
        assert torch.equal(keys, k[:, 4:] * (number + 1))
    assert (cache.length(12, 4), cache.length(12)) == (8, 12)


def test_dropped_rows_make_room(make):
    cache = make(layers=2)
    rows = torch.randn(1, 24, 2, 4)
    for start in range(0, 24, 4):
        cache.drop_before(start - 8)
        held = cache.bytes
        found = write(cache, Write(start, 4, seen_from=max(0, start - 8)), *[rows[:, start : start + 4]] * 2)
        for number, (keys, values) in enumerate(found):
            assert torch.equal(keys, rows[:, max(0, start - 8) : start + 4] * (number + 1))
            assert torch.equal(keys, values)
    assert cache.length(24) == 12 and held <= cache.bytes == 2 * 2 * 12 * 2 * 4 * 4
    cache.drop_before(100)
    assert cache.bytes == 0
    (keys, _), _ = write(cache, Write(100, 4), *random_rows(4))
    assert keys.shape[1] == 4 and cache.length(104) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_compression_is_the_same_in_main_memory(packed):
    torch.manual_seed(0)
    compression = Compression(2, 4, 1)
    caches = [
        KVCache(2, 2, 4, compression=compression, staging=staging, packed=packed) for staging in (None, Staging(CPU))
    ]
    for start in range(0, 40, 4):
        rows, query = random_rows(4), torch.randn(1, 4, 4, 4)
        at = Write(start, 4)
        here, waiting = (write(cache, at, *rows) for cache in caches)
        for cache in caches:
            for layer in cache.open(at, rows[0]):
                layer.update(*rows, at)
                layer.compress(query, at)
        for ours, expected in zip(waiting, here, strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
        selected = Write(start, 4, torch.tensor([2]))
        if start:  # the clean chunks' rows were merged, and a later chunk still finds its own
            continue
        for cache in caches:
            write(cache, selected, *(row[:, :1] for row in rows))
    assert caches[0].length(40) == caches[1].length(40) == 8


def test_caches_share_a_staging_in_turn():
    staging = Staging(CPU)
    caches = [KVCache(3, 2, 4, staging=staging) for _ in range(2)]
    rows = [random_rows(4) for _ in caches]
    for start in (0, 4, 8):
        for cache, (k, v) in zip(caches, rows, strict=True):
            for number, (keys, values) in enumerate(write(cache, Write(start, 4), k, v)):
                assert torch.equal(keys, torch.cat([k] * (start // 4 + 1), dim=1) * (number + 1))
                assert torch.equal(values, torch.cat([v] * (start // 4 + 1), dim=1) * (number + 1))


def test_writes_that_are_not_allowed(make):
    cache = make(layers=1, rows=8)
    k = torch.randn(1, 4, 2, 4)
    with pytest.raises(RuntimeError, match="never written whole"):
        cache.open(Write(0, 4, torch.tensor([1])), k)
    write(cache, Write(0, 4), k, k)
    cache.freeze(0)
    with pytest.raises(RuntimeError, match="are final"):
        cache.open(Write(0, 4), k)
    with pytest.raises(RuntimeError, match="10 rows .* room for 8"):
        cache.open(Write(6, 4), k)
