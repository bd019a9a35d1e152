"""What makes groups comparable: the rise of the loss if some units of a group went and a refit followed.

Scores rank the units of one group well. Added up they say little about what a group can spare: first-order
terms nearly vanish in a trained network, and what they leave out, curvature, the joint effect of many units
and what a refit makes up for, differs much from layer to layer. All three have a closed form for the layers
that read a group. With A the second moments of such a layer's inputs, W its weights, S the inputs that go and
K those that stay, the best fit from K alone misses output o of the layer by

    E_o(S) = W_oS (A_SS - A_SK A_KK^-1 A_KS) W_oS^T = sum over j in S of (W L)_oj ^ 2,   A = L L^T, S last

(optimal brain surgery for a set of inputs, arXiv 1705.07565), and the loss rises by sum_o F_o E_o, with F_o
its curvature along output o: the mean square of J^T u for random u, J the derivative of the network's output;
the loss is a square, so J^T J is its Gauss-Newton matrix. Samples count as they do in recovery: an error of
the noise is small where there is much of it, however wrong the image is that it stands for. One Cholesky
factor gives the whole curve, from the weakest unit to all of them. One pass forward and back over a few
samples and one forward serve all groups: F comes first, so that of a layer no more than its curve is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.flow.layers import (
    CONVOLUTIONS,
    input_rows,
    is_fittable,
    output_shape,
    places,
    rows_drawn,
    rows_looked_at,
)
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.runtime.processes import ALONE, Processes
from gfprune_cli.structure.blocks import streams_of
from gfprune_cli.structure.groups import ChannelGroup, Member
from gfprune_cli.structure.trace import first_given

RIDGE = 1e-2  # of the mean second moment, as in the refit
ROWS_PER_INPUT = 4
BLOCK = 512  # inputs that are worked on together
LEAST_RISE = 1e-4  # of the mean over all steps of all groups: what is smaller cannot be told from nothing


@dataclass
class Curves:
    """Takes the rise of the loss as each group loses its units, weakest first.

    Args:
        masked: the network at its present masks.
        order: group name -> [steps, units per step], weakest first.
        seed: of positions and directions.
        per_input: see `rows_looked_at`.
        processes: that share the layers: all run the network, each factorises the moments of some.
    """

    masked: MaskedModel
    order: Mapping[str, torch.Tensor]
    seed: int
    per_input: int = ROWS_PER_INPUT
    processes: Processes = ALONE
    found: Masks = field(default_factory=dict)  # group -> the rise of the loss after each step
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)  # of the channels of an output
    followed: set[str] = field(default_factory=set)  # layers and blocks whose slopes are counted
    powers: dict[str, torch.Tensor] = field(default_factory=dict)  # [channels] squares of the slopes, summed
    seen: set[str] = field(default_factory=set)  # layers and blocks that were looked at

    def take(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        piece: int | None = None,
        importance: torch.Tensor | None = None,
    ) -> Masks:
        """Group name -> [steps] rise of the loss after each step, up to one factor for all.

        Args:
            x: [N, ...] noisy samples, timesteps: [N].
            piece: samples that go there and back at once; None for all.
            importance: [N] weights of the samples in the loss; None for 1.
        """
        weights = self.masked.passing()
        whole = piece is None or piece >= len(x)
        size = len(x) if piece is None else piece
        for first in range(0, len(x), size):
            part = slice(first, min(len(x), first + size))
            with self.hooked(self.follow_layer, self.follow_block), torch.enable_grad():
                chosen = condition if whole or condition is None else condition[part]
                watched = weights.watched(lambda *_: None)  # else no output has slopes
                output = self.masked.forward(watched, x[part], timesteps[part], chosen)
                along = torch.randn((len(x), *output.shape[1:]), generator=generator(self.seed, "curves"))
                if importance is not None:
                    along *= importance.cpu().sqrt().view(-1, *[1] * (along.ndim - 1))
                self.go_back((output * along[part].to(output)).sum())
            self.outputs.clear()
            self.followed.clear()
        for group in self.masked.groups:
            self.found[group.name] = torch.zeros(len(self.order[group.name]), dtype=torch.float64)
        with self.hooked(self.read_layer, self.read_block), torch.no_grad():
            self.masked.forward(weights, x, timesteps, condition)
        return self.processes.totals(self.found)

    def is_due(self, source: str) -> bool:
        """Whether a layer or block with slopes runs for the first time, and is this process's to look at."""
        if source in self.seen or source not in self.powers:
            return False
        number = len(self.seen)
        self.seen.add(source)
        return number % self.processes.count == self.processes.rank

    @contextmanager
    def hooked(self, layer: Callable[..., None], block: Callable[..., None]) -> Iterator[None]:
        """Visit layers that read groups, and blocks, while the network runs.

        Args:
            layer: (name, what it reads, layer, inputs, named inputs, output); block: (name, group, module,
                inputs, named inputs, output).
        """
        readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
        for group in self.masked.groups:
            for member in () if group.is_block else group.members:
                if member.side == "in":
                    readers.setdefault(member.module, []).append((group, member))
        blocks = {
            member.module: group.name
            for group in self.masked.groups
            for member in (group.members if group.is_block else ())
        }
        with ExitStack() as stack:
            for name, module in self.masked.model.named_modules():
                visit: Any = None
                if name in blocks:
                    visit = partial(block, name, blocks[name])
                elif name in readers and is_fittable(module):
                    visit = partial(layer, name, readers[name])
                if visit is not None:
                    stack.enter_context(module.register_forward_hook(visit, with_kwargs=True))
            yield

    def follow(self, source: str, output: torch.Tensor, axis: int) -> None:
        """Have the slopes of an output counted on the way back; of its first call, where there are more.

        Where activations are computed again, outputs are not held until then, at the price of gradients of
        all weights.
        """
        if source in self.followed or not output.requires_grad:
            return
        self.followed.add(source)
        if self.masked.recompute is not None:
            output.register_hook(lambda slope: self.add_power(source, slope, axis))
        else:
            self.outputs[source], self.axes[source] = output, axis

    def go_back(self, total: torch.Tensor) -> None:
        """Count the slopes of all outputs that are followed."""
        if self.masked.recompute is not None:
            total.backward()
            return
        slopes = torch.autograd.grad(total, list(self.outputs.values()), allow_unused=True)
        for source, slope in zip(self.outputs, slopes, strict=True):
            if slope is not None:
                self.add_power(source, slope, self.axes[source])

    @torch.no_grad()
    def add_power(self, source: str, slope: torch.Tensor, axis: int) -> None:
        """Add the squares of slopes, channel by channel."""
        power = channel_rows(slope, axis).square().sum(0)
        self.powers[source] = self.powers[source] + power if source in self.powers else power

    def follow_layer(
        self, name: str, _read: Any, layer: Any, _inputs: Any, _named: Any, output: torch.Tensor
    ) -> None:
        self.follow(name, output, 1 if isinstance(layer, CONVOLUTIONS) else -1)

    def read_layer(
        self, name: str, read: list[tuple[ChannelGroup, Member]], layer: Any, inputs: Any, named: Any, _: Any
    ) -> None:
        """Add F_o E_o after each step of every group that a layer reads."""
        if not self.is_due(name):
            return
        x = first_given(inputs, named)
        shape = places(layer, output_shape(layer, x))
        source = generator(self.seed, "curve rows", name)
        rows = input_rows(x, layer, rows_drawn(shape, rows_looked_at(layer, self.per_input), source))
        scale = self.powers.pop(name).sqrt().unsqueeze(1)
        for group, member in read:
            going, steps = self.step_of_inputs(group, member, rows.shape[1]), len(self.order[group.name])
            order = torch.argsort(going, descending=True, stable=True).to(rows.device)
            missed = missed_by_input(rows[:, order], layer.weight.flatten(1)[:, order], scale)
            gone = torch.bincount(going, minlength=steps)[:steps].cumsum(0)
            if missed is not None:  # the weakest inputs leave first
                self.found[group.name] += missed.cpu().flip(0).cumsum(0)[(gone - 1).clamp_min(0)]

    def step_of_inputs(self, group: ChannelGroup, member: Member, inputs: int) -> torch.Tensor:
        """[inputs] the step at which each input of a layer goes; beyond the last for those that stay."""
        order = self.order[group.name]
        step = torch.empty(group.units, dtype=torch.long)
        for number, units in enumerate(order):
            step[units] = number
        width = self.masked.sizes[member.module, "in"]
        going = torch.full((width,), len(order))
        going[member.positions] = step.repeat_interleave(group.unit_size)[member.channels]
        return going.repeat_interleave(inputs // width)

    def streams(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int]]:
        """Of each stream through a block: its key, what it was and is, the axis of its channels."""
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        pairs = zip(streams_of(module, args, kwargs), outputs, strict=True)
        for number, (before, after) in enumerate(pairs):
            yield f"{name} {number}", before, after, 1 if after.ndim > 3 else -1

    def follow_block(self, name: str, _group: str, *seen: Any) -> None:
        for key, _, after, axis in self.streams(name, *seen):
            self.follow(key, after, axis)

    def read_block(self, name: str, group: str, *seen: Any) -> None:
        """A block that goes leaves its streams as they were: they miss what it adds."""
        for key, before, after, axis in self.streams(name, *seen):
            if self.is_due(key):
                added = channel_rows(after - before, axis).square().mean(0)
                self.found[group] += (added @ self.powers.pop(key)).cpu()


def missed_by_input(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """[n] float64: (W L)^2 over all outputs, what each input adds to the error when it and those after it go.

    L is the Cholesky factor of the second moments and a ridge. Where rows are fewer than inputs the moments
    are of low rank behind the ridge; what is left of them once some inputs are known is then followed through
    a matrix that is as wide as there are rows (Woodbury), a block of inputs at a time.

    Args:
        x: [R, n] inputs, those that go first last; weight: [o, n], in any precision; scale: [o, 1] float64 of
            the errors of the outputs.
    """
    rows, inputs = x.shape
    squares = torch.linalg.vector_norm(x, dim=0).double().square()
    parts = [slice(first, min(inputs, first + BLOCK)) for first in range(0, inputs, BLOCK)]
    ridge = RIDGE * (squares / rows).mean() + torch.finfo(torch.float32).tiny
    if rows >= inputs:
        moments = x.new_zeros(inputs, inputs)
        for part in parts:  # the lower triangle alone
            torch.mm(x[:, part].T, x[:, : part.stop], out=moments[part, : part.stop])
        moments = moments.double().div_(rows)
        moments.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if int(failed):
            return None
        scaled = (weight.double() * scale).to(x)  # what follows is a sum of squares: nothing cancels
        products = (scaled[:, part.start :] @ factor[part.start :, part].to(x) for part in parts)
        return torch.cat([product.double().square().sum(0) for product in products])
    unknown = torch.eye(rows, dtype=torch.float64, device=x.device)
    left = unknown.new_zeros(len(weight), rows)
    weights_of = lambda part: (weight[:, part].double() * scale).to(x)  # noqa: E731
    for part in parts:
        left += weights_of(part) @ x[:, part].T
    found = []
    for part in parts:  # products in float32 as above; what is taken away from again and again in float64
        own, given = weights_of(part), x[:, part]
        left -= own @ given.T
        seen = unknown.to(x) @ given
        moments = (given.T @ seen).double().div_(rows)
        moments.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if int(failed):
            return None
        factor = factor.to(x)
        half = torch.linalg.solve_triangular(factor, seen.T, upper=False)
        missed = (own @ factor).addmm_(left.to(x), half.T, alpha=1 / rows)
        found.append(missed.double().square().sum(0))
        unknown -= (half.T @ half).div_(rows)
    return torch.cat(found)


def channel_rows(values: torch.Tensor, axis: int) -> torch.Tensor:
    """[positions, channels] float64 of images [N, C, ...], axis 1, or tokens [..., C], axis -1."""
    last = values.movedim(axis, -1)
    return last.reshape(-1, last.shape[-1]).double()


def weakest_first(group: ChannelGroup, scores: torch.Tensor) -> torch.Tensor:
    """[steps, units per step]: the lowest unit of every cell, then the next ones."""
    order = scores.double().cpu()[group.cells].sort(dim=1, stable=True).indices
    return group.cells.gather(1, order).T


def comparable(
    masked: MaskedModel,
    scores: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    seed: int,
    piece: int | None = None,
    per_input: int = ROWS_PER_INPUT,
    processes: Processes = ALONE,
    importance: torch.Tensor | None = None,
) -> Masks:
    """Scores in units of the loss: what each unit adds to the rise when it goes in its turn.

    Args:
        scores: group name -> [units]; they say in which order the units of a group go.
        x, timesteps, condition: noisy samples to look at.
        piece: samples that go through the network and back at once; None for all.
        per_input: positions looked at, for each input of a layer; see `rows_looked_at`.
        processes: that share the work.
        importance: see `Curves.take`.

    Returns:
        group name -> [units] float64; within a group the order of the units is that of the scores.
    """
    order = {group.name: weakest_first(group, scores[group.name]) for group in masked.groups}
    curves = Curves(masked, order, seed, per_input, processes)
    rises = curves.take(x, timesteps, condition, piece, importance)
    # a greedy search walks up convex curves: what a step adds never falls
    steps = {
        name: rise.diff(prepend=rise.new_zeros(1)).clamp_min(0).sort().values for name, rise in rises.items()
    }
    least = LEAST_RISE * torch.cat(list(steps.values())).mean()
    found = {}
    for group in masked.groups:
        added = (steps[group.name] + least) / len(group.cells)
        found[group.name] = torch.empty(group.units, dtype=torch.float64)
        found[group.name][order[group.name]] = added.unsqueeze(1).expand(order[group.name].shape)
    return found
