"""Group norms, even and uneven, seen alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm

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


def is_feature_norm(module: Any) -> bool:
    """Whether a module is a layer norm or a root-mean-square norm over the last dimension."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1
    if type(module).__name__ in ("RMSNorm", "MochiRMSNorm", "LayerNorm"):
        return isinstance(getattr(module, "dim", None), torch.Size) and len(module.dim) == 1
    return False


def feature_count(norm: Any) -> int:
    """Features that a layer norm or root-mean-square norm runs over."""
    shape = norm.normalized_shape if isinstance(norm, nn.LayerNorm | nn.RMSNorm) else norm.dim
    return int(shape[0])


def centres(norm: Any) -> bool:
    """Whether a feature norm subtracts the mean."""
    return "LayerNorm" in type(norm).__name__
