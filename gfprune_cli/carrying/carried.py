"""What is carried, of every kind of adapter."""

from dataclasses import dataclass, field
from typing import Any

import torch

from gfprune_cli.checkpoint.correspondence import Stays

Tensors = dict[str, torch.Tensor]


@dataclass
class Carried:
    """A carried adapter.

    Args:
        tensors: by name, as they are written.
        layers: of the adapter, those that were dropped included.
        narrowed, moved, dropped: of them, those that lost rows or columns, that have a new name, and that
            have no place left.
        shapes: of them, as the pruned class's configuration has them.
        network: of an adapter that is one, with `tensors` as its weights.
    """

    tensors: Tensors = field(default_factory=dict)
    layers: int = 0
    narrowed: int = 0
    moved: int = 0
    dropped: list[str] = field(default_factory=list)
    shapes: dict[str, dict[str, int]] = field(default_factory=dict)
    network: Any = None


def chosen(tensor: torch.Tensor, stays: Stays | None, dimension: int, scale: float = 1.0) -> torch.Tensor:
    """What is left of one dimension, times a factor that removal put on the layer."""
    found = tensor if stays is None else tensor.index_select(dimension, torch.tensor(stays.indices))
    return found if scale == 1 else (found.float() * scale).to(tensor.dtype)
