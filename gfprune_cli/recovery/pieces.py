"""Tensors that may lie in pieces over the processes of a run, and what the processes find out together."""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from gfprune_cli.runtime.processes import Processes


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor: every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_not_finite(tensors: Mapping[str, torch.Tensor], processes: Processes) -> str | None:
    """The name of the first tensor with a number that is not finite, in any process; None: there is none."""
    if not tensors:
        return None
    bad = torch.stack([(~piece(tensor).isfinite()).any() for tensor in tensors.values()])
    found = processes.total(bad.float()).tolist()
    return next((name for name, count in zip(tensors, found, strict=True) if count), None)
