"""Weights that wait in main memory, and are on the device only while they are at work."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn


def offload_layers(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Bring `model` to the device without its `layers`, each of which follows when it is called.

    On a GPU a layer's weights come from pinned memory while the layer before it computes.

    Args:
        model: holds the layers anywhere inside. What is not in one of them should be small.
        layers: called in their order.
        device: the model's.
    """
    on_gpu = device.type == "cuda"
    inside = set(layers.modules())
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    stack = nn.ModuleDict({"layers": layers})
    host = torch.device("cpu")
    apply_group_offloading(
        stack, device, host, "block_level", num_blocks_per_group=1, use_stream=on_gpu, record_stream=on_gpu
    )
    # diffusers learns which layer to bring next from a forward of the whole, and until it has, waits for none of them.
    # These layers are called one by one, chunk after chunk: their order is told.
    hooks = [layer._diffusers_hook.get_hook("group_offloading") for layer in layers]
    for hook, after in pairwise(hooks):
        hook.next_group = after.group
    for hook in hooks:
        hook.group.onload_self = False


def offload_leaves(model: nn.Module, device: torch.device) -> None:
    """Bring each of a model's smallest parts to the device when it is called; for a model that is called as a whole."""
    apply_group_offloading(model, device, torch.device("cpu"), "leaf_level", use_stream=device.type == "cuda")
