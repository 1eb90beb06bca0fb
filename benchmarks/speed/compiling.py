"""Blocks that are compiled in some rows and not in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from common.compiling import room_for_graphs


class CompiledBlocks:
    """The repeated blocks of a model, compiled at first use and switched on and off after that.

    Args:
        transformer: whose blocks; eager outside of `on`.
        backend: of `torch.compile`.
    """

    def __init__(self, transformer: ModelMixin, backend: str) -> None:
        self._transformer, self._backend = transformer, backend
        self._calls: dict[nn.Module, Callable] = {}

    @contextmanager
    def on(self) -> Iterator[dict[str, int]]:
        """Inside, blocks run compiled.

        Yields:
            A dictionary that is filled at the end: `graphs` that were compiled inside, `graph_breaks`, and
            `graph_limit`: elsewhere, a function with as many graphs runs further shapes uncompiled.
        """
        if not self._calls:
            self._transformer.compile_repeated_blocks(backend=self._backend)
            compiled = (m for m in self._transformer.modules() if m._compiled_call_impl is not None)
            self._calls = {module: module._compiled_call_impl for module in compiled}
        for module, call in self._calls.items():
            module._compiled_call_impl = call
        before, found = _counted(), {}
        try:
            with room_for_graphs():  # one setting has its shapes, and the benchmark has many
                yield found
        finally:
            for module in self._calls:
                module._compiled_call_impl = None
            found.update({name: count - before[name] for name, count in _counted().items()})
            found["graph_limit"] = torch._dynamo.config.recompile_limit


def _counted() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
