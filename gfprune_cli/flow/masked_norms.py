"""Norms whose statistics weigh each channel by its mask.

A zeroed channel still counts in the statistics of a plain norm, so that its removal would shift them. These
compute, at masks of 0 and 1, what the plain norm computes after removal.
"""

from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm, group_norm_from_moments
from gfprune_cli.structure.norms import centres, feature_count, group_labels


class MaskedGroupNorm(nn.Module):
    """Group norm with mean = sum m_c x_c / sum m_c over a group's channels, and likewise the variance."""

    def __init__(self, norm: nn.GroupNorm | UnevenGroupNorm) -> None:
        super().__init__()
        labels = group_labels(norm).to(norm.weight.device)
        self.eps, self.num_groups = norm.eps, int(labels.max()) + 1
        self.weight, self.bias = norm.weight, norm.bias
        self.native = isinstance(norm, nn.GroupNorm)
        self.membership = nn.functional.one_hot(labels, self.num_groups).to(norm.weight.dtype)
        self.averaging = self.membership / self.membership.sum(0)
        self.full = True

    def set_mask(self, mask: torch.Tensor, *, full: bool | None = None) -> None:
        """Weigh channels by `mask` [C]; groups without any weight take statistics 0.

        Args:
            full: whether all of it is 1, if that is known: a look at the mask waits for its device.
        """
        weighted = self.membership * mask.to(self.membership).unsqueeze(1)
        self.averaging = weighted / weighted.sum(0).clamp_min(torch.finfo(weighted.dtype).tiny)
        self.full = bool((mask == 1).all()) if full is None else full

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.full and self.native:
            if torch.is_grad_enabled() and not x.requires_grad:
                # the way back of torch 2.13 crashes where an input that is channels last wants no gradient
                x = x.contiguous()
            return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return group_norm_from_moments(x, self.averaging, self.membership, self.weight, self.bias, self.eps)


class MaskedFeatureNorm(nn.Module):
    """Layer norm or root-mean-square norm over the last dimension, of torch or of diffusers.

    mean = sum m_c x_c / sum m_c (a layer norm's), variance = sum m_c (x_c - mean)^2 / sum m_c, in float32 or
    better. Without a weight of its own, what it returns is masked; the weight is masked elsewhere.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.channels, self.centred, self.eps = feature_count(norm), centres(norm), norm.eps
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.averaging = torch.empty(0)
        self.mask = torch.empty(0)
        self.full = True

    def set_mask(self, mask: torch.Tensor, *, full: bool | None = None) -> None:
        """Weigh channels by `mask` [C]; without any weight the statistics are 0.

        Args:
            full: whether all of it is 1, if that is known.
        """
        self.mask = mask
        self.averaging = mask / mask.sum().clamp_min(torch.finfo(mask.dtype).tiny)
        self.full = bool((mask == 1).all()) if full is None else full

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if own is None else own.to(dtype) for own in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            if not self.full:
                return self.masked(x.to(dtype), weight, bias).to(x.dtype)
            shape = (self.channels,)
            if self.centred:
                return nn.functional.layer_norm(x.to(dtype), shape, weight, bias, self.eps).to(x.dtype)
            normed = nn.functional.rms_norm(x.to(dtype), shape, weight, self.precision(x))
            return (normed if bias is None else normed + bias).to(x.dtype)

    def masked(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        averaging = self.averaging.to(x)
        if self.centred:
            x = x - (x @ averaging).unsqueeze(-1)
        normed = x * torch.rsqrt((x.square() @ averaging).unsqueeze(-1) + self.precision(x))
        normed = normed * (self.mask.to(x) if weight is None else weight)
        return normed if bias is None else normed + bias

    def precision(self, x: torch.Tensor) -> float:
        """Epsilon; torch's root-mean-square norm may leave it to the data type."""
        return torch.finfo(x.dtype).eps if self.eps is None else float(self.eps)
