"""Refit: what reads masked units is fitted again, by least squares, to what the dense network computes.

The networks run one after the other on the same noisy samples. When the masked one reaches a layer whose
outputs are no longer those of the dense network, the layer's weights become those that give them best,

    min over W of  | W x - y |^2  +  sum_c (1 - m_c) / m_c  |x_c W_c|^2  +  ridge |W - W_0|^2,

x the layer's inputs as they are now, y the outputs of the dense layer, W_0 the weights so far. As layers are
fitted in the order in which they run, each sees what those before it now give. The second term reads a soft
mask m_c as the chance that its unit stays: over that choice, the first two terms are the expected error.
Without it the fit would undo a mask of 1/2 by doubling what reads it; with it, what stays takes over as the
mask falls. Where a residual branch ends, y is the dense stream less what the shortcut now carries.

Channel pruning by reconstruction (arXiv 1707.06168) and AdaPrune (arXiv 2102.08124) fit after hard removal;
the soft masks are ours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.flow.layers import fan_in, input_rows, is_fittable, output_shape, places, rows_drawn, rows_of
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.residuals import Carrier, as_rows
from gfprune_cli.structure.trace import first_given

RIDGE = 1e-2  # of the mean square of an input, towards the weights that are there
OFFSET_RIDGE = 1e-6  # of a bias: nothing holds it where it is
ROWS_PER_INPUT = 8  # positions behind each unknown: more of them say nothing new
JUDGES = 8  # one sample in so many judges the fit of a layer
PIECE = 4096  # rows that are held at once
BAND = 576  # inputs whose products with those after them are taken at once
SAME = 1e-5  # relative error of a layer's outputs below which there is nothing to mend
Weights = dict[str, torch.Tensor]


@dataclass
class Refit:
    """Fits the layers of a masked network to the dense one that it was made from.

    Args:
        masked: its weights are changed in place.
        dense: stays as it is.
        residuals: layer -> where the stream that its output is added to can be seen (`find_residuals`).
        seed: of the positions that are looked at.
    """

    masked: MaskedModel
    dense: nn.Module
    residuals: Mapping[str, Carrier]
    seed: int
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    streams: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def fit(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        number: int,
        poll: Callable[[], None] = lambda: None,
    ) -> Weights:
        """Fit every layer once, on these samples.

        Args:
            x: [N, ...] noisy samples, timesteps: [N].
            number: of the call; tells its positions apart from those of others.
            poll: called before each layer and may raise: the weights are then as they were.

        Returns:
            the weights before, of those that changed.
        """
        before: Weights = {}
        effective = self.masked.effective()
        inside = {name: mask for (name, _), mask in self.masked.member_masks("in").items()}
        written = {name: mask for (name, _), mask in self.masked.member_masks("out").items()}

        def aim(name: str, layer: Any, _inputs: torch.Tensor, output: torch.Tensor) -> None:
            if name in self.targets:  # called twice: no single set of weights serves both
                self.targets[name] = torch.empty(0)
                return
            index = self.positions(name, layer, output.shape, number)
            self.targets[name] = self.with_stream(name, rows_of(output, layer, index), output.shape, index, 1)

        def fit(name: str, layer: Any, inputs: torch.Tensor) -> None:
            poll()
            target = self.targets.pop(name, None)
            if target is None or not len(target):
                return
            shape = output_shape(layer, inputs)
            index = self.positions(name, layer, shape, number)
            if len(index) != len(target):  # an expert, which is given other tokens now
                return
            problem = Problem(
                lambda first, end: input_rows(inputs, layer, index[first:end]),
                self.with_stream(name, target, shape, index, -1),
                softness(inside.get(name), fan_in(layer)),
                judged_from(index, places(layer, shape)),
            )
            self.renew(name, problem, written.get(name), effective, before)

        try:
            with self.hooked(self.dense, aim, after=True):
                call(self.dense, x, timesteps, condition)
            with self.hooked(self.masked.model, fit, after=False):
                self.masked.forward(effective, x, timesteps, condition)
        except BaseException:
            self.restore(before)
            raise
        finally:
            self.targets.clear()
            self.streams.clear()
        return before

    def restore(self, weights: Weights) -> None:
        """Take a fit back."""
        for name, tensor in weights.items():
            self.masked.weights[name].data.copy_(tensor)

    @contextmanager
    def hooked(self, model: nn.Module, visit: Any, *, after: bool) -> Iterator[None]:
        """Call `visit(name, layer, inputs[, output])` at every layer; note streams as they pass."""
        hooks = []
        carriers: dict[str, set[Carrier]] = {}
        for carrier in self.residuals.values():
            carriers.setdefault(carrier.module, set()).add(carrier)
        gone = tuple(f"{name}." for name, gate in self.masked.gates.items() if float(gate) == 0)
        waiting: dict[str, set[str]] = {}  # stream -> layers that have not seen it yet

        def visit_and_let_go(name: str, *seen: Any) -> None:
            visit(name, *seen)
            carrier = self.residuals.get(name)
            if carrier is not None:
                waiting[carrier.key].discard(name)
                if not waiting[carrier.key]:
                    self.streams.pop(carrier.key, None)

        for name, module in model.named_modules():
            hooks += [carrier.watch(module, self.streams) for carrier in carriers.get(name, ())]
            if is_fittable(module) and not name.startswith(gone):
                hooks.append(hook(name, module, visit_and_let_go, after=after))
                if name in self.residuals:
                    waiting.setdefault(self.residuals[name].key, set()).add(name)
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def positions(self, name: str, layer: Any, shape: Sequence[int], number: int) -> torch.Tensor:
        """The same positions of a layer's outputs in both networks."""
        source = generator(self.seed, "refit rows", number, name)
        return rows_drawn(places(layer, shape), ROWS_PER_INPUT * fan_in(layer), source)

    def with_stream(
        self, name: str, rows: torch.Tensor, shape: Sequence[int], index: torch.Tensor, sign: int
    ) -> torch.Tensor:
        """rows + sign * the stream that a layer's outputs are added to, if that can be seen."""
        carrier = self.residuals.get(name)
        stream = self.streams.get(carrier.key) if carrier else None
        found = None if stream is None else as_rows(stream, rows.shape[1], shape, index)
        return rows if found is None else rows + sign * found

    def renew(
        self,
        name: str,
        problem: "Problem",
        written: torch.Tensor | None,
        effective: Weights,
        before: Weights,
    ) -> None:
        """Give a layer its new weights, those under masks included; outputs at mask 0 keep theirs."""
        own = {key: self.masked.weights.get(f"{name}.{key}") for key in ("weight", "bias")}
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        rows = torch.arange(len(weight)) if written is None else torch.nonzero(written > 0).flatten()
        rows = rows.to(weight.device)
        matrix, offset = weight.detach().flatten(1)[rows], None if bias is None else bias.detach()[rows]
        found = problem.of_outputs(rows).solve(matrix.float(), None if offset is None else offset.float())
        if found is None:
            return
        for key, values in zip(("weight", "bias"), found, strict=True):
            parameter = own[key]
            if parameter is None or values is None:
                continue
            full = f"{name}.{key}"
            before[full] = parameter.detach().clone()
            whole = parameter.detach().flatten(1).clone() if key == "weight" else parameter.detach().clone()
            whole[rows] = values.to(whole.dtype)
            parameter.data.copy_(whole.view(parameter.shape))
            if full in self.masked.factors:
                effective[full].copy_(parameter.detach() * self.masked.factors[full])


def hook(name: str, module: nn.Module, visit: Any, *, after: bool) -> Any:
    if after:
        return module.register_forward_hook(
            lambda layer, given, named, output: visit(name, layer, first_given(given, named), output),
            with_kwargs=True,
        )
    return module.register_forward_pre_hook(
        lambda layer, given, named: visit(name, layer, first_given(given, named)), with_kwargs=True
    )


def softness(mask: torch.Tensor | None, inputs: int) -> torch.Tensor | None:
    """[inputs] (1 - m) / m of the unit behind each input; None where every mask is 0 or 1."""
    if mask is None or bool(((mask == 0) | (mask == 1)).all()):
        return None
    odds = torch.where(mask > 0, (1 - mask) / mask.clamp_min(1e-6), torch.zeros_like(mask))
    return odds.repeat_interleave(inputs // len(mask))


def judged_from(index: torch.Tensor, shape: Sequence[int]) -> int:
    """The first row that lies in one of the last samples, which only judge."""
    sample = index // (torch.Size(shape).numel() // shape[0])
    return int((sample < shape[0] - max(1, shape[0] // JUDGES)).sum())


@dataclass(frozen=True)
class Problem:
    """Least squares for one layer.

    Inputs are read a piece at a time: for a wide convolution all of them would take many times its weights.

    Args:
        read: (first, end) -> inputs [end - first, n] of these rows.
        y: [R, o] outputs wanted.
        soft: [n] weight of the penalty on what each input gives.
        known: rows that are fitted to; those after them only judge.
    """

    read: Callable[[int, int], torch.Tensor]
    y: torch.Tensor
    soft: torch.Tensor | None
    known: int

    def pieces(self, first: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows first ... end - 1 in order: inputs and outputs wanted."""
        for start in range(first, end, PIECE):
            stop = min(end, start + PIECE)
            yield self.read(start, stop), self.y[start:stop]

    def of_outputs(self, outputs: torch.Tensor) -> "Problem":
        return Problem(self.read, self.y[:, outputs], self.soft, self.known)

    def solve(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """New (weight [o, n], bias [o]); None where those that are there do as well on rows not fitted to."""
        moments = self.moments(weight, bias)
        if not moments.missed > SAME**2 * float(self.y.square().sum()):
            return None
        live = torch.nonzero(moments.gram.diagonal() > 0).flatten()
        soft = None if self.soft is None else self.soft[live]
        system, right = moments.equations(live, soft, weight, self.known if bias is not None else 0)
        del moments  # for wide layers the matrices are what takes memory
        factor, failed = torch.linalg.cholesky_ex(system)
        del system
        if int(failed):
            return None
        step = torch.cholesky_solve(right, factor).to(weight.dtype)
        new = weight.clone()
        new[:, live] += step[: len(live)].T
        offset = None if bias is None else bias + step[-1]
        if not bool(step.isfinite().all()) or not self.is_better(weight, bias, new, offset):
            return None
        return new, offset

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
        return Moments(gram, right, sums, wanted, float(missed))

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
        return bool(gains) and bool(torch.stack(gains).sum() > 0)


@dataclass(frozen=True)
class Moments:
    """Sums over rows, with x the inputs and e the error of the weights that are there.

    Args:
        gram: x^T x [n, n], its upper triangle; what is below the diagonal means nothing.
        right: x^T e [n, o].
        sums: of x [n]; wanted: of e [o]. Over the rows that are fitted to.
        missed: squared error over all rows.
    """

    gram: torch.Tensor
    right: torch.Tensor
    sums: torch.Tensor
    wanted: torch.Tensor
    missed: float

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
