"""Folding: a linear layer that sees few inputs as the product of two thin ones.

Inputs x of a layer y = W x + b that a timestep and a few conditions decide lie near a subspace of few
dimensions, and so do its outputs. With U [out, r] the leading singular vectors of the centred outputs,

    y ~ U (U^T W x) + c,      c = mean(y) - U U^T W mean(x)

is the best map of rank r from these inputs to these outputs (reduced-rank regression, Izenman 1975): the
basis is fitted to the outputs, and what does not move lies in the bias. r is the smallest rank whose outputs
meet a tolerance on samples that the basis was not fitted to, in the type in which the factors are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Stored = Callable[[torch.Tensor], torch.Tensor]  # rounds as the checkpoint's type does


@dataclass(frozen=True)
class Samples:
    """What a layer receives and has to give.

    Args:
        x: [N, in] inputs.
        y: [N, out] outputs of the dense layer; those of its own inputs, which may differ from `x`.
    """

    x: torch.Tensor
    y: torch.Tensor

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Factors:
    """`first` [r, in], `second` [out, r], `bias` [out]: y = second (first x) + bias."""

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] from [..., in]."""
        return torch.nn.functional.linear(x @ self.first.T, self.second, self.bias)

    @property
    def rank(self) -> int:
        return len(self.first)

    @property
    def size(self) -> int:
        """How many numbers they hold."""
        return self.first.numel() + self.second.numel() + self.bias.numel()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, over everything; 0 where both vanish."""
    missed = float((found - wanted).double().norm())
    return missed / max(float(wanted.double().norm()), torch.finfo(torch.float32).tiny) if missed else 0.0


def output_basis(weight: torch.Tensor, samples: Samples) -> torch.Tensor:
    """[out, k] orthonormal directions of the outputs of `weight`, those that vary most first.

    From the second moments in the smallest of the three spaces (samples, inputs, outputs), in float64.
    """
    centred = samples.x - samples.x.mean(0)
    if len(centred) > centred.shape[1]:  # rows with the same second moments, as many as there are inputs
        centred = torch.linalg.qr(centred, mode="r").R
    outputs = centred @ weight.T
    if outputs.shape[1] < len(outputs):
        return eigen(outputs.T @ outputs)[1].to(outputs)
    values, vectors = eigen(outputs @ outputs.T)
    live = values > values[:1] * torch.finfo(torch.float32).eps ** 2
    basis = outputs.T @ vectors[:, live].to(outputs)
    return torch.linalg.qr(basis / basis.norm(dim=0).clamp_min(torch.finfo(basis.dtype).tiny)).Q


def eigen(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, vectors) of a symmetric matrix, largest first; in float64, on the CPU."""
    values, vectors = torch.linalg.eigh(moments.double().cpu())
    return values.flip(0).clamp_min(0).to(moments.device), vectors.flip(1).to(moments.device)


def factors(weight: torch.Tensor, basis: torch.Tensor, samples: Samples, stored: Stored) -> Factors:
    """The layer on a basis of its outputs [out, r], as it is stored: factors first, then what they leave."""
    return with_bias(stored(basis.T @ weight), stored(basis), samples, stored)


def with_bias(first: torch.Tensor, second: torch.Tensor, samples: Samples, stored: Stored) -> Factors:
    """Factors, and the mean of what they leave."""
    bias = samples.y.mean(0) - second @ (first @ samples.x.mean(0))
    return Factors(first, second, stored(bias))


def break_even(weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    """The largest rank at which two factors hold fewer numbers than the layer."""
    outputs, inputs = weight.shape
    spare = weight.numel() - 1 - (outputs if bias is None else 0)
    return max(0, spare // (inputs + outputs))


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    fitted: Samples,
    judged: Samples,
    tolerance: float,
    stored: Stored,
) -> Factors | None:
    """The factors of the smallest rank that serves, or None where none that saves anything does.

    Args:
        fitted: what the basis is fitted to.
        judged: what the error, relative to the root mean square of the outputs, is taken on.
        tolerance: its bound.
        stored: see `Stored`.
    """
    most = break_even(weight, bias)
    basis = output_basis(weight, fitted)[:, :most]
    first, second = stored(basis.T @ weight), stored(basis)

    def serves(rank: int) -> bool:
        found = with_bias(first[:rank], second[:, :rank], fitted, stored)
        return relative_error(found(judged.x), judged.y) <= tolerance

    low, high = 1, basis.shape[1]
    if high < 1 or not serves(high):
        return None
    while low < high:  # the error falls with the rank
        middle = (low + high) // 2
        if serves(middle):
            high = middle
        else:
            low = middle + 1
    every = Samples(torch.cat([fitted.x, judged.x]), torch.cat([fitted.y, judged.y]))
    basis = output_basis(weight, every)[:, :high]
    return factors(weight, basis, every, stored)
