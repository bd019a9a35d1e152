"""Group norms, even and uneven, seen alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import UnevenGroupNorm

NORMS = (nn.GroupNorm, UnevenGroupNorm)


def group_sizes(norm: Any) -> list[int]:
    """Channels in each group of a norm, in order."""
    sizes = getattr(norm, "group_sizes", None)
    if sizes is None:
        return [norm.num_channels // norm.num_groups] * norm.num_groups
    return list(sizes)


def group_labels(norm: Any) -> torch.Tensor:
    """[C] the group that each channel of a norm belongs to."""
    sizes = group_sizes(norm)
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@contextmanager
def plain_stand_ins(model: nn.Module) -> Iterator[None]:
    """Put a plain norm in the place of every uneven one: the dependency graph knows only plain ones."""
    uneven = {name: module for name, module in model.named_modules() if isinstance(module, UnevenGroupNorm)}
    try:
        for name, module in uneven.items():
            plain: Any = nn.GroupNorm(1, module.num_channels, module.eps, device="meta")
            plain.weight, plain.bias, plain.group_sizes = module.weight, module.bias, module.group_sizes
            model.set_submodule(name, plain)
        yield
    finally:
        for name, module in uneven.items():
            model.set_submodule(name, module)
