"""Masked weights that exist only while a layer runs.

    at = masked.passing()
    masked.forward(at, x, timesteps)                                 # the masked network
    loss(at.watched(sums.add)).backward()                            # and gradients, as they arrive

A whole set of masked weights is one more copy of the network, one that is moved along a direction another,
and gradients a third. Here weights are made when they are read; autograd keeps how to make them
again in the place of what it would save (`torch.autograd.graph.saved_tensors_hooks`); and a gradient is
handed over when it arrives, and let go.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.runtime.half import wide

Taker = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class PassingWeights(Mapping[str, torch.Tensor]):
    """Effective weights m * theta + step * direction, by the name of a parameter.

    Args:
        weights: theta; factors: m, of those that have masks.
        taken: is given (name, gradient) whenever one arrives, once for each use of the weights.
        names: of the weights whose gradients are wanted; None for all of them.
        anchor: what autograd takes the weights to be made of; there where gradients are taken.
    """

    weights: Mapping[str, torch.Tensor]
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    direction: Mapping[str, torch.Tensor] | None = None
    step: float = 0.0
    taken: Taker | None = None
    names: Collection[str] | None = None
    anchor: torch.Tensor | None = None

    def moved(self, direction: Mapping[str, torch.Tensor], step: float) -> "PassingWeights":
        return replace(self, direction=direction, step=step)

    def watched(self, taken: Taker, names: Collection[str] | None = None) -> "PassingWeights":
        device = next(iter(self.weights.values())).device
        anchor = torch.zeros((), device=device, requires_grad=True)
        return replace(self, taken=taken, names=names, anchor=anchor)

    def made(self, name: str) -> torch.Tensor:
        """The effective weights; those that are as stored share their memory, if in float32."""
        weight = wide(self.weights[name].detach())
        factor = self.factors.get(name)
        if factor is not None:
            weight = weight * factor
        if self.direction is None:
            return weight
        return torch.add(weight, self.direction[name], alpha=self.step)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The same, as autograd sees them."""
        if self.anchor is None or (self.names is not None and name not in self.names):
            return self.made(name)
        made: torch.Tensor = Made.apply(self.anchor, self, name)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Made(torch.autograd.Function):
    """Weights out of nothing, whose gradient goes to who asked for it."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, passing: PassingWeights, name: str) -> torch.Tensor:
        ctx.passing, ctx.name = passing, name
        return passing.made(name)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.passing.taken(ctx.name, gradients[0])
        return None, None, None


@dataclass(frozen=True)
class Remake:
    """What autograd keeps in the place of a view of weights."""

    passing: PassingWeights
    name: str
    size: torch.Size
    stride: Any
    offset: Any

    def again(self) -> torch.Tensor:
        return self.passing.made(self.name).as_strided(self.size, self.stride, self.offset)


def remade(kept: Any) -> torch.Tensor:
    found: torch.Tensor = kept.again() if isinstance(kept, Remake) else kept
    return found


class Making(dict[str, Any]):
    """The parameters of a module, made as they are read: by its own forward, or by another that borrows them.

    Args:
        own: its parameters as they are; names: of those that are made.
        alive: address of weights that were made -> their name, while they are there.
    """

    def __init__(
        self,
        own: Mapping[str, Any],
        names: Mapping[str, str],
        passing: PassingWeights,
        alive: MutableMapping[int, str],
    ) -> None:
        super().__init__(own)
        self.names, self.passing, self.alive = names, passing, alive

    def __getitem__(self, key: str) -> Any:
        name = self.names.get(key)
        if name is None:
            return super().__getitem__(key)
        made = self.passing[name]
        address = made.untyped_storage().data_ptr()
        if address != self.passing.weights[name].untyped_storage().data_ptr():
            self.alive[address] = name
            weakref.finalize(made, self.alive.pop, address, None)
        return made


@contextmanager
def given_weights(model: nn.Module, passing: PassingWeights) -> Iterator[None]:
    """Run a network with these weights, of which autograd keeps none; outside it is as it was."""
    alive: dict[int, str] = {}

    def pack(tensor: torch.Tensor) -> Any:
        name = alive.get(tensor.untyped_storage().data_ptr())
        if name is None:  # of an operator's own output only the values: else it would hold itself for ever
            return tensor.detach()
        return Remake(passing, name, tensor.size(), tensor.stride(), tensor.storage_offset())

    with reading_weights(model, passing, alive), torch.autograd.graph.saved_tensors_hooks(pack, remade):
        yield


@contextmanager
def reading_weights(
    model: nn.Module, passing: PassingWeights, alive: MutableMapping[int, str] | None = None
) -> Iterator[None]:
    """Let the modules of a network read these weights; see `Making`."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    before = {module: module._parameters for module in model.modules() if module._parameters}
    made = {} if alive is None else alive
    try:
        for module, own in before.items():
            known = {key: names[id(weight)] for key, weight in own.items() if id(weight) in names}
            module.__dict__["_parameters"] = Making(own, known, passing, made)
        yield
    finally:
        for module, own in before.items():
            module.__dict__["_parameters"] = own
