"""A network set up as it would be in production, for measuring what it costs there."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.draws import generator
from gfprune_cli.inputs.examples import example_inputs

NetworkInputs = Callable[[nn.Module, int], dict[str, Any]]


def prepare(model: nn.Module, device: torch.device) -> Any:
    """A copy as it would be deployed: on the device, in evaluation mode, NHWC where convolutions want it."""
    network: Any = copy.deepcopy(model).eval()
    network = nn.Module.to(network, device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    # autocast keeps its half-precision copies of weights from call to call only if they could be trained
    return network.requires_grad_(True)


def batch_inputs(model: nn.Module, batch: int) -> dict[str, Any]:
    """Keyword arguments of `forward`: `batch` noise images, and what else the network takes."""
    source = generator(0, "latency")
    inputs = {}
    for name, value in example_inputs(model).items():
        if name == "sample":
            noise = torch.randn(batch, *value.shape[1:], generator=source).to(value)
            nhwc = torch.channels_last if noise.is_cuda else torch.contiguous_format
            inputs[name] = noise.contiguous(memory_format=nhwc)
        else:
            inputs[name] = value.expand(batch, *value.shape[1:]).contiguous()
    return inputs
