"""The energy of gradient-flow pruning, its gradient, and the Hessian-gradient product behind it.

With effective weights theta(m) = m * theta and the denoising loss L (arXiv 2501.09464; the product is
that of GraSP, arXiv 2002.07376):

    E(m) = -1/2 || grad L(m * theta) ||^2        dE/dm_i = - sum over p in unit i of  theta_p (H g)_p

`g` is accumulated over all draws before H is applied: the mean of H_j g_j is not H times the mean of g.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfprune_cli.flow.passing import PassingWeights, Taker

Weights = dict[str, torch.Tensor]
Loss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # weights -> mean loss of a chunk of draws
Way = Literal["exact", "finite-difference"]


@dataclass(frozen=True)
class Pieced:
    """The loss of one chunk of the draws in pieces that fit in memory: their sum.

    There are none where other processes have all of its draws.
    """

    pieces: tuple[Loss, ...]

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = [piece(weights) for piece in self.pieces]
        return torch.stack(values).sum() if values else torch.zeros(())


def pieces_of(loss: Loss) -> tuple[Loss, ...]:
    return loss.pieces if isinstance(loss, Pieced) else (loss,)


RELATIVE_STEP = 3e-5  # of the weight norm: below it float32 rounding wins, above it curvature changes
AGREEMENT = 1e-2  # two finite-difference steps must agree this well to be trusted


def as_passing(weights: Mapping[str, torch.Tensor]) -> PassingWeights:
    return weights if isinstance(weights, PassingWeights) else PassingWeights(weights)


def take_gradient(
    losses: Sequence[Loss],
    weights: Mapping[str, torch.Tensor],
    taken: Taker,
    factor: float = 1.0,
    names: Collection[str] | None = None,
) -> float:
    """Mean loss over all chunks, one piece of one in memory at a time; its gradient goes to `taken`.

    Args:
        losses: one function per chunk; chunks count equally.
        weights: point of evaluation; leaves this function untouched.
        taken: is given (name, part of the gradient): their sum is factor * the gradient of the mean.
        names: of the weights that it is taken by; None for all of them.
    """
    total: torch.Tensor | None = None  # read once: every look at a number waits for the device
    watched = as_passing(weights).watched(taken, names)
    with torch.enable_grad():
        for piece in (piece for loss in losses for piece in pieces_of(loss)):
            value = piece(watched)
            if value.requires_grad:  # a pass may use none of the weights that are asked about
                (value * (factor / len(losses))).backward()
            part = value.detach().double()
            total = part if total is None else total + part
    return 0.0 if total is None else total.item() / len(losses)


class Sum:
    """Adds up what arrives in parts, by name."""

    def __init__(self) -> None:
        self.parts: Weights = {}

    def add(self, name: str, part: torch.Tensor) -> None:
        if name in self.parts:
            self.parts[name] += part
        else:  # autograd may hand out one tensor for several inputs, or an expanded one
            self.parts[name] = part.clone()

    def like(self, weights: Mapping[str, torch.Tensor]) -> Weights:
        """All of them, in this order; zeros where nothing came."""
        return {
            name: self.parts[name] if name in self.parts else torch.zeros_like(weights[name])
            for name in weights
        }


def gradient(losses: Sequence[Loss], weights: Mapping[str, torch.Tensor]) -> tuple[float, Weights]:
    """Mean loss and gradient over all chunks; see `take_gradient`."""
    found = Sum()
    value = take_gradient(losses, weights, found.add)
    return value, found.like(weights)


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all tensors."""
    squares = torch.stack([tensor.double().square().sum() for tensor in tensors.values()])
    return float(sum(squares.tolist())) ** 0.5


def exact_product(losses: Sequence[Loss], weights: Mapping[str, torch.Tensor], vector: Weights) -> Weights:
    """H v by differentiating the gradient again: (3 to 4 gradients, about 2.7 times the memory of one)."""
    product = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # fused kernels have first derivatives only
        for piece in (piece for loss in losses for piece in pieces_of(loss)):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
            inputs = list(leaves.values())
            first = torch.autograd.grad(
                piece(leaves), inputs, create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = torch.stack(
                [(part * vector[name]).sum() for name, part in zip(leaves, first, strict=True)]
            ).sum()
            second = torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)
            for name, part in zip(leaves, second, strict=True):
                product[name] += part.detach()
    return {name: tensor / len(losses) for name, tensor in product.items()}


def take_differences(
    losses: Sequence[Loss],
    weights: Mapping[str, torch.Tensor],
    vector: Weights,
    taken: Taker,
    relative_step: float = RELATIVE_STEP,
) -> None:
    """H v as a central difference of two gradients: (grad(w + h v) - grad(w - h v)) / 2h.

    Args:
        taken: is given (name, part); nothing where v is 0.
    """
    length = norm(vector)
    if length == 0:
        return
    step = relative_step * norm(weights) / length
    at = as_passing(weights)
    for side in (step, -step):
        take_gradient(losses, at.moved(vector, side), taken, 1 / (2 * side))


def finite_difference_product(
    losses: Sequence[Loss],
    weights: Mapping[str, torch.Tensor],
    vector: Weights,
    relative_step: float = RELATIVE_STEP,
) -> Weights:
    """H v whole; see `take_differences`."""
    found = Sum()
    take_differences(losses, weights, vector, found.add, relative_step)
    return found.like(weights)


def choose_way(
    losses: Sequence[Loss],
    weights: Mapping[str, torch.Tensor],
    vector: Weights,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda part: part,
) -> Way:
    """Finite differences when two step sizes agree on the first chunk, else the exact product.

    Args:
        total: sum of what the processes that share the draws have found.
    """
    steps = (2 * RELATIVE_STEP, RELATIVE_STEP)
    found = [finite_difference_product(losses[:1], weights, vector, step) for step in steps]
    coarse, fine = ({name: total(part) for name, part in product.items()} for product in found)
    scale = norm(fine)
    gap = norm({name: fine[name] - coarse[name] for name in fine})
    return "finite-difference" if gap <= AGREEMENT * scale else "exact"
