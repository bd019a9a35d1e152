"""The energy of gradient-flow pruning, its gradient, and the Hessian-gradient product behind it.

With effective weights theta(m) = m * theta and the denoising loss L (arXiv 2501.09464; the product is
that of GraSP, arXiv 2002.07376):

    E(m) = -1/2 || grad L(m * theta) ||^2        dE/dm_i = - sum over p in unit i of  theta_p (H g)_p

`g` is accumulated over all draws before H is applied: the mean of H_j g_j is not H times the mean of g.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Weights = dict[str, torch.Tensor]
Loss = Callable[[Weights], torch.Tensor]  # weights by name -> mean loss of one chunk of the draws
Way = Literal["exact", "finite-difference"]


@dataclass(frozen=True)
class Pieced:
    """The loss of one chunk of the draws in pieces that fit in memory: their sum."""

    pieces: tuple[Loss, ...]

    def __call__(self, weights: Weights) -> torch.Tensor:
        return torch.stack([piece(weights) for piece in self.pieces]).sum()


def pieces_of(loss: Loss) -> tuple[Loss, ...]:
    return loss.pieces if isinstance(loss, Pieced) else (loss,)


def attention(*, fused: bool) -> AbstractContextManager[Any]:
    """Fused kernels of attention keep no attention weights, and have first derivatives only."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


RELATIVE_STEP = 3e-5  # of the weight norm: below it float32 rounding wins, above it curvature changes
AGREEMENT = 1e-2  # two finite-difference steps must agree this well to be trusted


def gradient(losses: Sequence[Loss], weights: Weights, *, fused: bool = False) -> tuple[float, Weights]:
    """Mean loss and gradient over all chunks, one piece of one in memory at a time.

    Args:
        losses: one function per chunk; chunks count equally.
        weights: point of evaluation; leaves this function untouched.
        fused: take the fused kernels of attention, where there are some.
    """
    total: torch.Tensor | None = None  # read once: every look at a number waits for the device
    summed: Weights = {}
    with attention(fused=fused), torch.enable_grad():
        for piece in (piece for loss in losses for piece in pieces_of(loss)):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
            value = piece(leaves)
            found = torch.autograd.grad(
                value, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            part = value.detach().double()
            total = part if total is None else total + part
            if not summed:
                # autograd may hand out one tensor for several inputs, or an expanded one
                summed = {name: part.clone() for name, part in zip(leaves, found, strict=True)}
            else:
                for name, part in zip(leaves, found, strict=True):
                    summed[name] += part
    for tensor in summed.values():
        tensor /= len(losses)
    assert total is not None
    return total.item() / len(losses), summed


def norm(tensors: Weights) -> float:
    """Euclidean norm over all tensors."""
    squares = torch.stack([tensor.double().square().sum() for tensor in tensors.values()])
    return float(sum(squares.tolist())) ** 0.5


def exact_product(losses: Sequence[Loss], weights: Weights, vector: Weights) -> Weights:
    """H v by differentiating the gradient again: (3 to 4 gradients, about 2.7 times the memory of one)."""
    product = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    with attention(fused=False), torch.enable_grad():
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


def finite_difference_product(
    losses: Sequence[Loss],
    weights: Weights,
    vector: Weights,
    relative_step: float = RELATIVE_STEP,
    *,
    fused: bool = False,
) -> Weights:
    """H v as a central difference of two gradients: (grad(w + h v) - grad(w - h v)) / 2h."""
    length = norm(vector)
    if length == 0:
        return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    step = relative_step * norm(weights) / length

    def moved(by: float) -> Weights:
        return {name: tensor + by * vector[name] for name, tensor in weights.items()}

    _, ahead = gradient(losses, moved(step), fused=fused)
    _, behind = gradient(losses, moved(-step), fused=fused)
    for name, tensor in ahead.items():
        tensor -= behind.pop(name)
        tensor /= 2 * step
    return ahead


def choose_way(losses: Sequence[Loss], weights: Weights, vector: Weights, *, fused: bool = False) -> Way:
    """Finite differences when two step sizes agree on the first chunk, else the exact product."""
    coarse = finite_difference_product(losses[:1], weights, vector, 2 * RELATIVE_STEP, fused=fused)
    fine = finite_difference_product(losses[:1], weights, vector, fused=fused)
    scale = norm(fine)
    gap = norm({name: fine[name] - coarse[name] for name in fine})
    return "finite-difference" if gap <= AGREEMENT * scale else "exact"


def hessian_gradient_product(
    losses: Sequence[Loss], weights: Weights, vector: Weights, way: Way, *, fused: bool = False
) -> Weights:
    """H v over all chunks, in the way asked for."""
    if way == "exact":
        return exact_product(losses, weights, vector)
    return finite_difference_product(losses, weights, vector, fused=fused)
