"""Compiled transformer blocks: whether this machine can make them, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from common.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

GRAPHS = 64
"""Graphs that a block may have, shared by all layers. A run needs about ten: for first and later writes of K/V, whole
and selected tokens, and the stock pipeline. PyTorch's own limit of 8 would end it in the middle."""


def check_compiler(device: torch.device) -> None:
    """Compile a sum on the device: PyTorch's compiler needs others, with their headers, that may not be there.

    Raises:
        UserError: it fails; the line says at what.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever stands in the way, it is told
        reason = str(error).strip().split("\n")[0]
        needed = "a C++ compiler and Python's headers" if device.type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"compile: true does not work here, {needed} are needed on {device} ({reason}); use --set compile=false"
        ) from error


def compile_blocks(transformer: ModelMixin) -> None:
    """Let the repeated blocks of a transformer be compiled at their first use, for good; one graph serves all layers.

    A block that cannot be compiled in one piece is an error, not slower.
    """
    transformer.compile_repeated_blocks(fullgraph=True)


@contextmanager
def room_for_graphs() -> Iterator[None]:
    """Inside, a block may be compiled for as many kinds of calls as a comparison makes."""
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        yield
