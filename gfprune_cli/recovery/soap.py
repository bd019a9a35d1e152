"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (arXiv 2409.11321, algorithm 3).

Of the gradients G [m, n] of a matrix the means of G G^T and G^T G are kept, and a basis Q of each, which
comes closer to the eigenvectors by a step of orthogonal iteration, Q <- qr(L Q), once in `basis_steps`. A
hundredth of the mean eigenvalue is added to L: where it has no rank, and any basis would do, Q stays, and
what rounding makes of a gradient does not grow.

With a basis of one side alone a convolution trains worse than by Muon: matrices with a side longer than
`LONGEST`, whose basis would be dear, are left to another optimiser.
"""

from typing import Any

import torch

LONGEST = 1024  # an orthogonal iteration takes as many operations as the third power of it
BASIS_STEPS, BASIS_SAMPLES = 5, 40  # between two iterations, at least
FIRST_STEPS = 3  # each of which moves the bases, which begin as none
MOMENTUM, POWER, PRODUCTS = 0.9, 0.95, 0.9  # decays of the means of gradients, of their squares, of L
DAMPING = 1e-2
FLOOR = 1e-2  # of a gradient's root mean square: what is smaller is rounding, and moves nothing
TINY = 1e-20


def basis_steps(batch: int) -> int:
    """Steps from one iteration of the bases to the next: of small batches more, as it is dear beside them."""
    return max(BASIS_STEPS, BASIS_SAMPLES // batch)


def fits(matrix: torch.Tensor) -> bool:
    """Whether both bases of a matrix cost little."""
    return max(matrix.shape) <= LONGEST


def empty_state(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept of a matrix before its first step, beside the number of steps."""
    state = {"exp_avg": torch.zeros_like(matrix), "exp_avg_sq": torch.zeros_like(matrix)}
    for side, length in zip(("left", "right"), matrix.shape, strict=True):
        state[side] = matrix.new_zeros(length, length)
        state[f"{side}_basis"] = torch.eye(length, dtype=matrix.dtype, device=matrix.device)
    return state


def numbers_kept(matrix: torch.Tensor) -> int:
    """How many numbers are kept of a matrix, by Muon where it does not fit."""
    bases = sum(2 * side * side for side in matrix.shape)
    return 2 * matrix.numel() + bases if fits(matrix) else matrix.numel()


def precondition(
    matrix: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, Any],
    step: int,
    *,
    lr: float,
    decay: float,
    every: int = BASIS_STEPS,
) -> None:
    """One step, in place.

    Args:
        state: as `empty_state` made it.
        step: from 1 on.
        lr, decay: rate, and decoupled weight decay.
        every: steps from one iteration of the bases to the next.
    """
    due = step <= FIRST_STEPS or step % every == 0
    for side, products in (("left", gradient @ gradient.T), ("right", gradient.T @ gradient)):
        state[side].lerp_(products, 1 - PRODUCTS)
        if due:
            state[f"{side}_basis"].copy_(closer(state[side], state[f"{side}_basis"]))
    state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
    state["exp_avg_sq"].lerp_(turned(gradient, state).square(), 1 - POWER)
    squares = state["exp_avg_sq"] / (1 - POWER**step)
    size = squares.sqrt().add_(FLOOR * squares.mean().sqrt() + TINY)
    update = turned(state["exp_avg"], state).div_(size)
    matrix.mul_(1 - lr * decay)
    matrix.add_(turned_back(update, state), alpha=-lr / (1 - MOMENTUM**step))


def closer(products: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[n, n] a basis that is closer to the eigenvectors of `products` than `basis`."""
    damping = DAMPING * products.trace() / len(products)
    return torch.linalg.qr(products @ basis + damping * basis)[0]


def turned(matrix: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """A matrix in its bases."""
    return state["left_basis"].T @ matrix @ state["right_basis"]


def turned_back(matrix: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """A matrix out of its bases."""
    return state["left_basis"] @ matrix @ state["right_basis"].T
