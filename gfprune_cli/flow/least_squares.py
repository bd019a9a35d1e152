"""Least squares for one layer: new weights whose outputs come nearest to those wanted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.runtime.processes import ALONE, Processes

RIDGE = 1e-2  # of the mean square of an input, towards the weights that are there
OFFSET_RIDGE = 1e-6  # of a bias: nothing holds it where it is
PIECE = 4096  # rows that are held at once
BAND = 576  # inputs whose products with those after them are taken at once
SAME = 1e-5  # relative error of a layer's outputs below which there is nothing to mend
Step = tuple[torch.Tensor, torch.Tensor | None]  # of weights [n, o] and bias [o]


@dataclass(frozen=True)
class Problem:
    """Least squares for one layer.

    Inputs are read a piece at a time: for a wide convolution all of them would take many times its weights.

    Args:
        read: (first, end) -> inputs [end - first, n] of these rows.
        y: [R, o] outputs wanted.
        soft: [n] weight of the penalty on what each input gives.
        known: rows that are fitted to; those after them only judge.
        processes: that have rows of one problem each; all of them solve it, and find the same.
        all_known: rows that are fitted to, of all processes; None for those of one.
    """

    read: Callable[[int, int], torch.Tensor]
    y: torch.Tensor
    soft: torch.Tensor | None
    known: int
    processes: Processes = ALONE
    all_known: int | None = None

    @property
    def fitted(self) -> int:
        """Rows that are fitted to, by all processes together."""
        return self.known if self.all_known is None else self.all_known

    def pieces(self, first: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows first ... end - 1 in order: inputs and outputs wanted."""
        for start in range(first, end, PIECE):
            stop = min(end, start + PIECE)
            yield self.read(start, stop), self.y[start:stop]

    def of_outputs(self, outputs: torch.Tensor) -> "Problem":
        return replace(self, y=self.y[:, outputs])

    def solve(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """New (weight [o, n], bias [o]); None where those that are there do as well on rows not fitted to."""
        few = self.fitted < weight.shape[1]
        step = self.step_of_rows(weight, bias) if few else self.step_of_moments(weight, bias)
        if step is None or not bool(step[0].isfinite().all()):
            return None
        new = weight + step[0].T
        offset = None if bias is None or step[1] is None else bias + step[1]
        return (new, offset) if self.is_better(weight, bias, new, offset) else None

    def is_wrong(self, missed: torch.Tensor, power: torch.Tensor) -> bool:
        """Whether there is something to mend, by the squared error over all rows, and their squares."""
        return bool(missed > SAME**2 * power)

    def step_of_moments(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Step | None:
        """From the normal equations, which are as wide as the inputs; None: nothing to mend."""
        moments = self.moments(weight, bias)
        if not self.is_wrong(moments.missed, moments.power):
            return None
        live = torch.nonzero(moments.gram.diagonal() > 0).flatten()
        soft = None if self.soft is None else self.soft[live]
        system, right = moments.equations(live, soft, weight, self.fitted if bias is not None else 0)
        del moments  # for wide layers the matrices are what takes memory
        factor, failed = torch.linalg.cholesky_ex(system)
        del system
        if int(failed):
            return None
        found = torch.cholesky_solve(right, factor).to(weight.dtype)
        step = weight.new_zeros(weight.shape[1], weight.shape[0])
        step[live] = found[: len(live)]
        return step, None if bias is None else found[-1]

    def step_of_rows(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Step | None:
        """The same from equations that are as wide as there are rows, where those are fewer.

        With D the diagonal of what holds the weights, D^-1 X^T (X D^-1 X^T + 1)^-1 is (X^T X + D)^-1 X^T.
        """
        own = list(self.pieces(0, self.known)) or [(weight.new_zeros(0, weight.shape[1]), self.y[:0])]
        x, y = (self.processes.joined(torch.cat(parts)) for parts in zip(*own, strict=True))
        error = y - nn.functional.linear(x, weight, bias)
        judging = weight.new_zeros(())
        for judged, wanted in self.pieces(self.known, len(self.y)):
            judging += (wanted - nn.functional.linear(judged, weight, bias)).square().sum()
        judging, squares = self.processes.total(torch.stack([judging, self.y.square().sum()]))
        missed = error.square().sum() + judging
        power = x.square().sum(0)
        if not self.is_wrong(missed, squares) or not bool(power.any()):
            return None
        penalty = torch.zeros_like(power) if self.soft is None else self.soft.to(power) * power
        held = RIDGE * power[power > 0].mean() + penalty
        back = (penalty / held).unsqueeze(1) * weight.T  # towards 0, where masks are soft
        middle = x.mean(0), error.mean(0)
        if bias is not None:
            x, error = x - middle[0], error - middle[1]
        scaled = x / held
        system = (scaled @ x.T).double()
        system.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            return None
        found = torch.cholesky_solve((error + x @ back).double(), factor).to(x.dtype)
        step = scaled.T @ found - back
        return step, None if bias is None else middle[1] - middle[0] @ step

    def moments(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "Moments":
        """What the normal equations are made of, from one pass over the rows."""
        inputs, outputs = weight.shape[1], weight.shape[0]
        gram, right = weight.new_zeros(inputs, inputs), weight.new_zeros(inputs, outputs)
        sums, wanted, missed = weight.new_zeros(inputs), weight.new_zeros(outputs), weight.new_zeros(())
        for x, y in self.pieces(0, self.known):
            error = y - nn.functional.linear(x, weight, bias)
            for first in range(0, inputs, BAND):  # the upper triangle alone
                gram[first : first + BAND, first:].addmm_(x[:, first : first + BAND].T, x[:, first:])
            right.addmm_(x.T, error)
            sums += x.sum(0)
            wanted += error.sum(0)
            missed += error.square().sum()
        for x, y in self.pieces(self.known, len(self.y)):
            missed += (y - nn.functional.linear(x, weight, bias)).square().sum()
        small = torch.cat([sums, wanted, missed.view(1), self.y.square().sum().view(1)])
        sums, wanted, missed, power = self.processes.total(small).split([inputs, outputs, 1, 1])
        return Moments(self.processes.total(gram), self.processes.total(right), sums, wanted, missed, power)

    def is_better(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        new: torch.Tensor,
        offset: torch.Tensor | None,
    ) -> bool:
        """Whether the fit lowers its own objective, less the ridge, on the rows that judge."""

        def objective(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
            error = (y - nn.functional.linear(x, weight, bias)).square().sum()
            if self.soft is None:
                return error
            return error + (weight.square() @ (self.soft.to(x) * x.square().sum(0))).sum()

        gains = [
            objective(x, y, weight, bias) - objective(x, y, new, offset)
            for x, y in self.pieces(self.known, len(self.y))
        ]
        gain = torch.stack(gains).sum() if gains else weight.new_zeros(())
        return bool(self.processes.total(gain) > 0)


@dataclass(frozen=True)
class Moments:
    """Sums over rows, with x the inputs and e the error of the weights that are there.

    Args:
        gram: x^T x [n, n], its upper triangle; what is below the diagonal means nothing.
        right: x^T e [n, o].
        sums: of x [n]; wanted: of e [o]. Over the rows that are fitted to.
        missed: squared error over all rows; power: of the outputs wanted there.
    """

    gram: torch.Tensor
    right: torch.Tensor
    sums: torch.Tensor
    wanted: torch.Tensor
    missed: torch.Tensor
    power: torch.Tensor

    def equations(
        self, live: torch.Tensor, soft: torch.Tensor | None, weight: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normal equations of the live inputs, in float64: [n, n] and [n, o].

        With `rows` there is one more unknown, which is added to every one of so many rows.

        Args:
            soft: [live] weight of the penalty on what each input gives.
        """
        count, more = len(live), int(rows > 0)
        system = weight.new_zeros(count + more, count + more, dtype=torch.float64)
        inner = system[:count, :count]
        every = count == len(self.gram)
        inner.copy_((self.gram if every else self.gram[live.unsqueeze(1), live]).T)  # below the diagonal
        power = inner.diagonal().clone()
        right = self.right[live].double()
        inner.diagonal().add_(RIDGE * power.mean() if count else 0)
        if soft is not None:
            penalty = soft.to(power) * power
            inner.diagonal().add_(penalty)
            right -= penalty.unsqueeze(1) * weight[:, live].T.double()
        if more:
            system[count, :count] = self.sums[live]
            system[count, count] = rows * (1 + OFFSET_RIDGE)
            right = torch.cat([right, self.wanted.double().unsqueeze(0)])
        return system, right
