"""Compiled blocks: no graph breaks, and few graphs, whatever the number of layers, chunks and selected tokens."""

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import random_pipeline

from common.attention import attend, without_cudnn
from common.cache import Engine, MotionCacheConfig, Staging
from magi1_motioncache import apply_motioncache as attach_magi
from skyreels_v2_motioncache import apply_motioncache

LAYERS = 10
BUDGET = MotionCacheConfig(distance="input", warmup_steps=1, chunk_phase=0, budget=0.4)


@pytest.fixture
def graphs():
    """A backend that runs what it is given as it is, and the graphs that it was given."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    yield backend, seen
    torch._dynamo.reset()


def skyreels(**changes):
    pipe, call = random_pipeline(layers=LAYERS)
    apply_motioncache(pipe, BUDGET.replace(**changes))
    return pipe, lambda: call(num_inference_steps=4, ar_step=1)


def magi(**sampling):
    pipe = make_magi_pipeline(layers=LAYERS, num_steps=4, window_size=2, noise2clean_kvrange=(), **sampling)
    pipe.set_progress_bar_config(disable=True)
    attach_magi(pipe, BUDGET)
    size = {"height": 32, "width": 32, "num_frames": 32}

    def call():
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", **size, generator=generator, output_type="latent").frames

    return pipe, call


@pytest.fixture(params=[None, torch.device("cpu")], ids=["", "K/V elsewhere"])
def kept_elsewhere(request, monkeypatch):
    """K/V where they are, or brought for each layer as from main memory."""
    if request.param is not None:
        monkeypatch.setattr(Engine, "new_staging", lambda self, device: Staging(device))


CLOSE = {"atol": 1e-5, "rtol": 1.3e-6}
ROUNDED = {"atol": 1e-3, "rtol": 0}  # rounding to 8 bits makes a whole step of a difference in the last digit


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (skyreels, CLOSE),
        (lambda: skyreels(kv_dtype="int8"), ROUNDED),
        (magi, CLOSE),
        (lambda: magi(cfg_number=1, distill=True, shortcut_mode="8,16,16"), CLOSE),
    ],
    ids=["skyreels", "skyreels-packed", "magi", "magi-distilled"],
)
def test_one_compiled_block_serves_all_layers_and_chunks(make, near, graphs, kept_elsewhere):
    backend, seen = graphs
    pipe, call = make()
    plain = call()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    compiled = call()
    torch.testing.assert_close(compiled, plain, **near)
    assert 0 < len(seen) < min(LAYERS, torch._dynamo.config.recompile_limit)
    first = len(seen)
    call()
    assert len(seen) == first


def test_calls_that_leave_cudnn_out_have_graphs_of_their_own(graphs):
    backend, seen = graphs
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    key = torch.randn(1, 40, 2, 8)

    def choices():
        return ["_sdpa_kernel" in graph.code for graph in seen]

    def call(queries):
        query = torch.randn(1, queries, 2, 8)
        torch.testing.assert_close(compiled(query, key, key), attend(query, key, key))

    call(200)
    with without_cudnn():
        for queries in (200, 201, 202):
            call(queries)
    assert choices() == [False, True, True]
    call(203)  # the newest graph fits all numbers of queries, and is not for this call
    assert choices() == [False, True, True, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
