"""Soft masks: one number in [0, 1] per unit, moved by bounded steps and applied to what units produce."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.func import functional_call

from gfprune_cli.checkpoint.modeling.gfprune_unet2d_v1 import UnevenGroupNorm, group_norm_from_moments
from gfprune_cli.data.conditions import Condition, call_with
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.norms import NORMS, group_labels

Masks = dict[str, torch.Tensor]  # group name -> [units]


def full_masks(groups: tuple[ChannelGroup, ...], device: torch.device) -> Masks:
    # float64: a long run adds tens of thousands of small steps, and must still arrive at 0 or 1
    return {group.name: torch.ones(group.units, dtype=torch.float64, device=device) for group in groups}


def move(
    masks: Masks, support: Mapping[str, torch.Tensor], speed: Mapping[str, torch.Tensor], bound: float
) -> Masks:
    """One step of the mask flow on the sparse budget: no entry moves by more than `bound`.

    Units inside the support recover towards 1. Units outside it leave towards 0, those with the strongest
    flow at the full bound and those with the weakest at half of it.

    Args:
        support: group name -> bool [units], the units that the budget keeps.
        speed: group name -> [units] in [0, 1], rank of the flow -dE/dm.
    """
    moved = {}
    for name, mask in masks.items():
        inside = support[name].to(mask.device)
        down = bound * (0.5 + 0.5 * speed[name].to(mask.device, mask.dtype))
        moved[name] = torch.where(inside, mask + bound, mask - down).clamp(0, 1)
    return moved


def settled(masks: Masks) -> bool:
    """Whether every entry is exactly 0 or 1."""
    return all(bool(((mask == 0) | (mask == 1)).all()) for mask in masks.values())


class MaskedGroupNorm(nn.Module):
    """Group norm whose statistics weigh each channel by its mask.

    A zeroed channel still counts in the mean and variance of a plain group norm, so that its removal would
    shift them. Here mean = sum m_c x_c / sum m_c, and likewise the variance: at m in {0, 1} this is what the
    network computes after removal.
    """

    def __init__(self, norm: nn.GroupNorm | UnevenGroupNorm) -> None:
        super().__init__()
        labels = group_labels(norm).to(norm.weight.device)
        self.eps, self.num_groups = norm.eps, int(labels.max()) + 1
        self.weight, self.bias = norm.weight, norm.bias
        self.native = isinstance(norm, nn.GroupNorm)
        self.membership = nn.functional.one_hot(labels, self.num_groups).to(norm.weight.dtype)
        self.averaging = self.membership / self.membership.sum(0)
        self.full = True

    def set_mask(self, mask: torch.Tensor) -> None:
        """Weigh channels by `mask` [C]; groups without any weight take statistics 0."""
        weighted = self.membership * mask.to(self.membership).unsqueeze(1)
        self.averaging = weighted / weighted.sum(0).clamp_min(torch.finfo(weighted.dtype).tiny)
        self.full = bool((mask == 1).all())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.full and self.native:
            return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return group_norm_from_moments(x, self.averaging, self.membership, self.weight, self.bias, self.eps)


@dataclass
class MaskedModel:
    """A network whose units are multiplied by masks, without a change to its weights.

    Args:
        model: the network; its norms are replaced by mask-aware ones in place.
        groups: channel groups of the network.
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    masks: Masks = field(default_factory=dict)
    weights: dict[str, nn.Parameter] = field(init=False)
    factors: dict[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, NORMS):
                self.model.set_submodule(name, MaskedGroupNorm(module))
        self.weights = dict(self.model.named_parameters())
        device = next(iter(self.weights.values())).device
        self.set_masks(self.masks or full_masks(self.groups, device))

    def set_masks(self, masks: Masks) -> None:
        """Make these the masks of the network: factors of the producers' weights, weights of the norms."""
        self.masks = masks
        channel_masks = self.member_masks()
        self.factors = {}
        for (name, embedding), mask in channel_masks.items():
            module = self.model.get_submodule(name)
            if isinstance(module, MaskedGroupNorm):
                module.set_mask(mask)
            for leaf in ("weight", "bias"):
                weight = self.weights.get(f"{name}.{leaf}")
                if weight is not None:
                    shape = [1] * weight.ndim
                    shape[1 if embedding else 0] = -1
                    self.factors[f"{name}.{leaf}"] = mask.to(weight).view(shape)

    def member_masks(self) -> dict[tuple[str, bool], torch.Tensor]:
        """(producer, is an embedding) -> [output channels] mask; concatenated groups fill their own parts."""
        found: dict[tuple[str, bool], torch.Tensor] = {}
        for group in self.groups:
            per_channel = self.masks[group.name].repeat_interleave(group.unit_size)
            for member in group.producers:
                key = (member.module, member.kind == "embedding")
                if key not in found:
                    module = self.model.get_submodule(member.module)
                    weight = module.weight
                    assert isinstance(weight, torch.Tensor)
                    found[key] = per_channel.new_ones(weight.shape[1 if key[1] else 0])
                found[key][member.positions] = per_channel[member.channels]
        return found

    def effective(self, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """theta(m) = m * theta, by parameter name."""
        source: Mapping[str, torch.Tensor] = self.weights if weights is None else weights
        return {
            name: tensor * self.factors[name] if name in self.factors else tensor
            for name, tensor in source.items()
        }

    def forward(
        self,
        effective: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition = None,
    ) -> torch.Tensor:
        """Network output at the given effective weights: [N, ...], or [N, 2, ...] with two branches."""
        weights = dict(effective)
        return call_with(
            lambda args, kwargs: functional_call(self.model, weights, args, kwargs), x, timesteps, condition
        )

    def unit_sums(self, values: Mapping[str, torch.Tensor]) -> Masks:
        """Sum a quantity given per parameter over the producers of each unit: group name -> [units]."""
        sums = {}
        for group in self.groups:
            total = torch.zeros(group.units, dtype=torch.float64)
            for member in group.producers:
                for leaf in ("weight", "bias"):
                    value = values.get(f"{member.module}.{leaf}")
                    if value is None:
                        continue
                    per_row = value.double()
                    per_row = (
                        per_row.sum(0)
                        if member.kind == "embedding"
                        else per_row.flatten(1).sum(1)
                        if value.ndim > 1
                        else per_row
                    )
                    total.index_add_(0, member.channels // group.unit_size, per_row.cpu()[member.positions])
            sums[group.name] = total
        return sums


@contextmanager
def plain_norms(masked: MaskedModel) -> Iterator[None]:
    """Ignore the masks in the norms' statistics, as every other soft pruner does; for comparison only."""
    norms = [module for module in masked.model.modules() if isinstance(module, MaskedGroupNorm)]
    saved = [(norm.averaging, norm.full) for norm in norms]
    for norm in norms:
        norm.set_mask(torch.ones(len(norm.membership)))
    try:
        yield
    finally:
        for norm, (averaging, full) in zip(norms, saved, strict=True):
            norm.averaging, norm.full = averaging, full
