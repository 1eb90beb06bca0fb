"""Compiled blocks: no graph breaks, and few graphs, whatever the number of layers, chunks and selected tokens."""

import pytest
import torch
from skyreels_random import random_pipeline

from common.cache import MotionCacheConfig
from skyreels_v2_motioncache import apply_motioncache

LAYERS = 10


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


def test_one_compiled_block_serves_all_layers_and_chunks(graphs):
    backend, seen = graphs
    pipe, call = random_pipeline(layers=LAYERS)
    apply_motioncache(pipe, MotionCacheConfig(distance="input", warmup_steps=1, chunk_phase=0, budget=0.4))
    options = {"num_inference_steps": 4, "ar_step": 1}
    plain = call(**options)
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    compiled = call(**options)
    torch.testing.assert_close(compiled, plain)
    assert 0 < len(seen) < min(LAYERS, torch._dynamo.config.recompile_limit)
    first = len(seen)
    call(**options)
    assert len(seen) == first
