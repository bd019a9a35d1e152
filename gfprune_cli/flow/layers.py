"""Layers as linear maps: what they read and give at single positions, as rows of matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEAST_ROWS = 4096


def is_fittable(module: Any) -> bool:
    """Whether a layer's outputs are its weights times its inputs, position by position."""
    if isinstance(module, CONVOLUTIONS):
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def fan_in(layer: Any) -> int:
    """Inputs behind each output of a layer."""
    return int(layer.weight[0].numel())


def output_shape(layer: Any, inputs: torch.Tensor) -> tuple[int, ...]:
    """Shape of what a layer makes of its inputs."""
    channels = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return (*inputs.shape[:-1], channels)
    geometry = zip(inputs.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True)
    return (
        inputs.shape[0],
        channels,
        *((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in geometry),
    )


def places(layer: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a layer's outputs without their channels: samples first."""
    return tuple(shape[:-1]) if isinstance(layer, nn.Linear) else (shape[0], *shape[2:])


def rows_looked_at(layer: Any, per_input: int) -> int:
    """Positions behind what is said of a layer: so many for each input, and 4096 at least."""
    return max(LEAST_ROWS, per_input * fan_in(layer))


def rows_drawn(shape: Sequence[int], wanted: int, source: torch.Generator) -> torch.Tensor:
    """Positions of a layer's outputs, ascending: all, or as many at random as `wanted`.

    Args:
        shape: from `places`.
    """
    total = torch.Size(shape).numel()
    if total <= wanted:
        return torch.arange(total)
    return torch.randperm(total, generator=source)[:wanted].sort().values


def rows_of(output: torch.Tensor, layer: Any, index: torch.Tensor) -> torch.Tensor:
    """[rows, channels] of a layer's outputs."""
    last = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])[index.to(output.device)].float()


def input_rows(inputs: torch.Tensor, layer: Any, index: torch.Tensor) -> torch.Tensor:
    """[rows, fan in] what a layer reads to make its outputs at some positions."""
    index = index.to(inputs.device)
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])[index].float()
    padding = [side for pad in reversed(layer.padding) for side in (pad, pad)]
    patches = nn.functional.pad(inputs, padding)
    for number, (side, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        patches = patches.unfold(2 + number, side, stride)
    sides = len(layer.kernel_size)
    where = torch.unravel_index(index, (patches.shape[0], *patches.shape[2 : 2 + sides]))
    return patches.movedim(1, 1 + sides)[where].reshape(len(index), -1).float()
