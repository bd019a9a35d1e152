"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (arXiv 2409.11321, algorithm 3).

A weight is a tensor of modes: outputs and inputs of a linear layer, and the kernel of a convolution. Of its
gradients G the means L of G_i G_i^T are kept, G_i the unfolding of mode i, and a basis Q of each, which comes
closer to the eigenvectors by a step of orthogonal iteration, Q <- qr(L Q), once in `basis_steps`. A hundredth
of the mean eigenvalue is added to L: where it has no rank, and any basis would do, Q stays, and what rounding
makes of a gradient does not grow. The momentum looks ahead, as Nesterov's does.

With a basis of one side alone a convolution trains worse than by Muon: weights with a mode longer than
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


def fits(weight: torch.Tensor) -> bool:
    """Whether the bases of a weight of a linear layer or a convolution cost little."""
    return max(weight.shape) <= LONGEST


def empty_state(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept of a tensor before its first step, beside the number of steps."""
    state = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
    for mode, length in enumerate(tensor.shape):
        state[f"products_{mode}"] = tensor.new_zeros(length, length)
        state[f"basis_{mode}"] = torch.eye(length, dtype=tensor.dtype, device=tensor.device)
    return state


def numbers_kept(tensor: torch.Tensor) -> int:
    """How many numbers are kept of a tensor of modes."""
    return 2 * tensor.numel() + sum(2 * length * length for length in tensor.shape)


def precondition(
    tensor: torch.Tensor,
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
        tensor, gradient: a length for each mode.
        state: as `empty_state` made it.
        step: from 1 on.
        lr, decay: rate, and decoupled weight decay.
        every: steps from one iteration of the bases to the next.
    """
    due = step <= FIRST_STEPS or step % every == 0
    for mode, length in enumerate(gradient.shape):
        unfolded = gradient.movedim(mode, 0).reshape(length, -1)
        products, basis = state[f"products_{mode}"], state[f"basis_{mode}"]
        products.lerp_(unfolded @ unfolded.T, 1 - PRODUCTS)
        if due:
            basis.copy_(closer(products, basis))
    state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
    state["exp_avg_sq"].lerp_(turned(gradient, state).square(), 1 - POWER)
    squares = state["exp_avg_sq"] / (1 - POWER**step)
    size = squares.sqrt().add_(FLOOR * squares.mean().sqrt() + TINY)
    ahead = torch.lerp(state["exp_avg"], gradient, 1 - MOMENTUM)  # what the mean would be with this one again
    update = turned(ahead, state).div_(size)
    tensor.mul_(1 - lr * decay)
    tensor.add_(turned_back(update, state), alpha=-lr / (1 - MOMENTUM**step))


def closer(products: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[n, n] a basis that is closer to the eigenvectors of `products` than `basis`."""
    damping = DAMPING * products.trace() / len(products)
    return torch.linalg.qr(products @ basis + damping * basis)[0]


def turned(tensor: torch.Tensor, state: dict[str, Any], side: int = 0) -> torch.Tensor:
    """A tensor in its bases."""
    for mode in range(tensor.ndim):  # each goes to the end, so that all stand in their order again
        tensor = torch.tensordot(tensor, state[f"basis_{mode}"], ([0], [side]))
    return tensor


def turned_back(tensor: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """A tensor out of its bases."""
    return turned(tensor, state, side=1)
