"""A network that can be timed, from its structure alone: weights do not matter for time."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from gfprune_cli.structure.removal import carry_over, empty, is_empty, stock_config

DEVIATION = 0.02


def with_random_weights(network: Any) -> Any:
    """A network of the same structure on the CPU, with the tables that its class computes."""
    found = empty(type(network), stock_config(network), init_empty_weights(include_buffers=False))
    for name, parameter in list(found.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.randn(parameter.shape) * DEVIATION
        setattr(found.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    for module in found.modules():
        for leaf, buffer in list(module._buffers.items()):
            if is_empty(buffer):
                setattr(module, leaf, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return carry_over(network, found).eval()
