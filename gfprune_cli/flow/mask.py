"""Soft masks: one number in [0, 1] per unit, moved by bounded steps and applied to what units produce."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from gfprune_cli.diffusion.conditions import Condition, call, call_with
from gfprune_cli.flow.masked_norms import MaskedFeatureNorm, MaskedGroupNorm
from gfprune_cli.flow.passing import PassingWeights, given_weights
from gfprune_cli.flow.recompute import Recompute
from gfprune_cli.runtime.half import half_of, kept_in
from gfprune_cli.structure.blocks import gate
from gfprune_cli.structure.groups import ChannelGroup, Member, Side
from gfprune_cli.structure.norms import NORMS, is_feature_norm
from gfprune_cli.structure.removal import dimension_size, empty_parameter

Masks = dict[str, torch.Tensor]  # group name -> [units]


def full_masks(groups: tuple[ChannelGroup, ...]) -> Masks:
    # float64: a long run adds tens of thousands of small steps, and must still arrive at 0 or 1
    return {group.name: torch.ones(group.units, dtype=torch.float64) for group in groups}


def move(masks: Masks, support: Mapping[str, torch.Tensor], bound: float) -> Masks:
    """One step of the mask flow on the sparse budget: no entry moves by more than `bound`.

    Units inside the support recover towards 1, those outside leave towards 0.

    Args:
        support: group name -> bool [units], the units that the budget keeps.
    """
    return {
        name: torch.where(support[name].to(mask.device).bool(), mask + bound, mask - bound).clamp(0, 1)
        for name, mask in masks.items()
    }


def settled(masks: Masks) -> bool:
    """Whether every entry is exactly 0 or 1."""
    return all(bool(((mask == 0) | (mask == 1)).all()) for mask in masks.values())


class MaskedOutput:
    """A forward hook that masks the last dimension of what a module returns."""

    mask: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.mask is None else output * self.mask.to(output)


@dataclass
class MaskedModel:
    """A network whose units are multiplied by masks, without a change to its weights.

    Args:
        model: the network; its norms are replaced by mask-aware ones in place.
        groups: channel groups of the network.
        masks: on the CPU, where they are decided.
        recomputes: whether activations are computed again on the way back, where the network can.
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    masks: Masks = field(default_factory=dict)
    recomputes: InitVar[bool] = False
    recompute: Recompute | None = field(init=False, default=None)
    weights: dict[str, nn.Parameter] = field(init=False)
    returned: dict[str, "MaskedOutput"] = field(init=False, default_factory=dict)
    factors: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    gates: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    sizes: dict[tuple[str, Side], int] = field(init=False)

    def __post_init__(self, recomputes: bool) -> None:
        if recomputes:
            self.recompute_blocks()
        channels = [group for group in self.groups if not group.is_block]
        members = {member.module for group in channels for member in group.members}
        self.sizes = {
            (member.module, member.side): dimension_size(self.model, member.module, member.side)
            for group in channels
            for member in group.members
        }
        for name, module in list(self.model.named_modules()):
            if name.endswith(".norm_cross"):  # attention asks for one of torch's own norms there
                continue
            if isinstance(module, NORMS) and module.weight is not None:
                self.model.set_submodule(name, MaskedGroupNorm(module))
            elif name in members and is_feature_norm(module):
                self.model.set_submodule(name, MaskedFeatureNorm(module))
        for group in self.groups:
            for member in group.members if group.is_block else ():
                self.model.get_submodule(member.module).register_forward_hook(
                    lambda module, args, kwargs, output, name=group.name: gate(
                        module, self.gates[name], args, kwargs, output
                    ),
                    with_kwargs=True,
                )
        self.weights = dict(self.model.named_parameters())
        for name, _ in list(self.model.named_buffers()):
            if name in members:  # a table that its owner adds to what it returns, or computes anew
                self.returned[name] = MaskedOutput()
                owner = self.model.get_submodule(name.rpartition(".")[0])
                owner.register_forward_hook(self.returned[name])
        self.set_masks(self.masks or full_masks(self.groups))

    def recompute_blocks(self) -> None:
        """From now on activations of blocks are computed again on the way back, where the network can."""
        self.recompute = self.recompute or Recompute.of(self.model)

    def set_masks(self, masks: Masks) -> None:
        """Make these the masks of the network: factors of the producers' weights, weights of the norms."""
        self.masks = {name: mask.cpu() for name, mask in masks.items()}
        members = self.member_masks()
        stacked = [group.name for group in self.groups if group.is_block]
        cast = self.sent([*members.values(), *(self.masks[name] for name in stacked)])
        exact = cast(torch.float64)
        self.gates = {name: gate[0] for name, gate in zip(stacked, exact[len(members) :], strict=True)}
        self.factors = {}
        modules = dict(self.model.named_modules())
        for number, ((name, dimension), mask) in enumerate(members.items()):
            module = modules.get(name)
            if isinstance(module, MaskedGroupNorm | MaskedFeatureNorm):
                module.set_mask(exact[number], full=bool((mask == 1).all()))
            if name in self.returned:
                self.returned[name].mask = exact[number]
            for key in leaves(name):
                weight = self.weights.get(key)
                if weight is not None:
                    shape = [1] * weight.ndim
                    shape[dimension] = -1
                    self.factors[key] = cast(weight.dtype)[number].view(shape)

    @property
    def half(self) -> str | None:
        """The half precision that weights are kept in; None where all are float32."""
        return half_of(self.model)

    def keep_in(self, half: str | None) -> None:
        """Keep the weights so from now on, as far as that loses nothing."""
        kept_in(self.model, half)
        self.weights = dict(self.model.named_parameters())

    def let_go(self) -> None:
        """Give up the weights: what has been made of the network has them now."""
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            empty_parameter(self.model, name)
        self.weights = {}

    def sent(self, masks: list[torch.Tensor]) -> Callable[[torch.dtype], tuple[torch.Tensor, ...]]:
        """Type -> the masks in it on the device of the network.

        They travel in one piece: a copy for each of hundreds of layers would wait for the device each time.
        """
        device = next(iter(self.weights.values())).device
        whole = torch.cat([torch.empty(0, dtype=torch.float64), *masks]).to(device, non_blocking=True)
        sizes = [len(mask) for mask in masks]
        return functools.cache(lambda dtype: whole.to(dtype).split(sizes))

    def member_masks(self, side: Side = "out") -> dict[tuple[str, int], torch.Tensor]:
        """(member, the dimension of its weights) -> mask; concatenated groups fill their own parts.

        Args:
            side: of the producers, or of what reads them ("in").
        """
        found: dict[tuple[str, int], torch.Tensor] = {}
        for group in self.groups:
            if group.is_block:
                continue  # the mask of a block multiplies what it adds to its stream: see `gate`
            per_channel = self.masks[group.name].repeat_interleave(group.unit_size)
            for member in (member for member in group.members if member.side == side):
                key = (member.module, masked_dimension(member))
                if key not in found:
                    found[key] = per_channel.new_ones(self.sizes[member.module, side])
                found[key][member.positions] = per_channel[member.channels]
        return found

    def passing(self) -> PassingWeights:
        """theta(m) = m * theta, by parameter name, made as it is needed."""
        return PassingWeights(self.weights, self.factors)

    def forward(
        self,
        effective: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition = None,
    ) -> torch.Tensor:
        """Network output at the given effective weights: [N, ...], or [N, 2, ...] with two branches."""
        if isinstance(effective, PassingWeights):
            again = self.recompute if effective.anchor is not None else None
            with given_weights(self.model, effective) if again is None else again.at(effective):
                return call(self.model, x, timesteps, condition)
        weights = dict(effective)
        return call_with(
            lambda args, kwargs: functional_call(self.model, weights, args, kwargs), x, timesteps, condition
        )


def leaves(name: str) -> tuple[str, ...]:
    """Names of the tensors that a member may own: a module's weight and bias, or a parameter itself."""
    return f"{name}.weight", f"{name}.bias", name


def masked_dimension(member: Member) -> int:
    """The dimension of a member's tensors that its channels run along."""
    return {"embedding": 1, "parameter": -1}.get(member.kind, 0)
