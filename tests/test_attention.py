"""Attention without a mask: the same result whichever kernel it takes, and the kernel that was asked for."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from common import attention
from common.attention import attend


@pytest.fixture
def threads() -> Iterator[None]:
    """Several threads, as a user has them; the other tests run on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dispatched(monkeypatch) -> list[int]:
    """Numbers of queries that went to diffusers' dispatcher."""
    seen, dispatch = [], attention.dispatch_attention_fn

    def spy(query: Tensor, *args, **kwargs) -> Tensor:
        seen.append(query.shape[1])
        return dispatch(query, *args, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", spy)
    return seen


def heads(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values; keys and values laid out as a K/V cache has them: a head's rows side by side."""
    torch.manual_seed(queries)
    q = torch.randn(2, queries, 3, 8)
    k, v = (torch.randn(2, 3, keys + 5, 8).transpose(1, 2)[:, :keys] for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.double() for x in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize("queries", [1, 191, 192])
def test_few_and_many_queries_agree(threads, dispatched, queries):
    tensors = heads(queries, 40)
    out = attend(*tensors)
    torch.testing.assert_close(out.double(), by_hand(*tensors), atol=1e-6, rtol=1e-5)
    assert dispatched == ([192] if queries == 192 else [])


def test_one_thread_other_types_and_a_chosen_backend_go_to_the_dispatcher(threads, dispatched):
    attend(*heads(4, 40, torch.bfloat16))
    attend(*heads(5, 40), backend="native")
    torch.set_num_threads(1)
    attend(*heads(6, 40))
    assert dispatched == [4, 5, 6]


def test_few_queries_compile_into_one_graph(threads):
    tensors = heads(4, 40)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
