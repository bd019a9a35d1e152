"""Refit: what reads masked units is fitted again, by least squares, to what the dense network computes.

The networks run in turns on the same noisy samples. When the masked one reaches a layer whose outputs are no
longer those of the dense network, which goes as far, the layer's weights become those that give them best,

    min over W of  | W x - y |^2  +  sum_c (1 - m_c) / m_c  |x_c W_c|^2  +  ridge |W - W_0|^2,

x the layer's inputs as they are now, y the outputs of the dense layer, W_0 the weights so far. As layers are
fitted in the order in which they run, each sees what those before it now give. The second term reads a soft
mask m_c as the chance that its unit stays: over that choice, the first two terms are the expected error.
Without it the fit would undo a mask of 1/2 by doubling what reads it; with it, what stays takes over as the
mask falls. Where a residual branch ends, y is the dense stream less what the shortcut now carries.

Channel pruning by reconstruction (arXiv 1707.06168) and AdaPrune (arXiv 2102.08124) fit after hard removal;
the soft masks are ours.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition, call, some_of
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.flow.layers import (
    fan_in,
    input_rows,
    is_fittable,
    output_shape,
    places,
    rows_drawn,
    rows_looked_at,
    rows_of,
)
from gfprune_cli.flow.least_squares import Problem
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.relay import Hand, relayed
from gfprune_cli.flow.residuals import Carrier, as_rows
from gfprune_cli.runtime.half import wide
from gfprune_cli.runtime.processes import ALONE, Processes
from gfprune_cli.structure.trace import hooked, layer_hook

ROWS_PER_INPUT = 8  # positions behind each unknown: more of them say nothing new
JUDGES = 8  # one sample in so many judges the fit of a layer
Weights = MutableMapping[str, torch.Tensor]
Streams = dict[str, torch.Tensor]  # by the key of their carrier
Calls = dict[str, list[torch.Size]]  # layer -> shape of its inputs at each call


@dataclass
class Refit:
    """Fits the layers of a masked network to the dense one that it was made from.

    Args:
        masked: its weights are changed in place.
        dense: stays as it is.
        residuals: layer -> where the stream that its output is added to can be seen (`find_residuals`).
        seed: of the positions that are looked at.
        per_input: how many of them, for each input of a layer; see `rows_looked_at`.
        processes: that share the samples, and add up what they say of a layer before it is fitted. A network
            that routes samples to layers runs them all in every process: some may have none for a layer.
        aside: makes a place for the weights before a fit.
    """

    masked: MaskedModel
    dense: nn.Module
    residuals: Mapping[str, Carrier]
    seed: int
    per_input: int = ROWS_PER_INPUT
    processes: Processes = ALONE
    aside: Callable[[], Weights] = dict
    repeated: frozenset[str] | None = None  # layers that run more than once: no weights serve all their calls

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
        before = self.aside()
        if self.repeated is None:
            calls = layer_calls(self.dense, x[:1], timesteps[:1], some_of(condition, slice(1)))
            self.repeated = frozenset(name for name, shapes in calls.items() if len(shapes) > 1)
            count = self.processes.count
            if len(x) < count or (count > 1 and self.routes(calls, x, timesteps, condition)):
                self.processes = ALONE
        part, total = self.processes.share(len(x)), len(x)
        own = slice(part.start, part.stop)

        def positions(name: str, layer: Any, shape: Sequence[int]) -> tuple[torch.Tensor, int, int]:
            source = generator(self.seed, "refit rows", number, name)
            return shared_rows(
                part, total, places(layer, shape), rows_looked_at(layer, self.per_input), source
            )

        x, timesteps = x[own], timesteps[own]
        condition = some_of(condition, own)
        weights = self.masked.passing()
        inside = {name: mask for (name, _), mask in self.masked.member_masks("in").items()}
        written = {name: mask for (name, _), mask in self.masked.member_masks("out").items()}

        aims: Streams = {}
        streams: Streams = {}

        def dense_pass(hand: Hand) -> None:
            def aim(name: str, layer: Any, _inputs: torch.Tensor, output: torch.Tensor) -> None:
                index, *_ = positions(name, layer, output.shape)
                rows = rows_of(output, layer, index)
                hand(name, self.with_stream(name, aims, rows, output.shape, index, 1))

            with self.hooked(self.dense, aim, aims, after=True):
                call(self.dense, x, timesteps, condition)

        def fit(name: str, layer: Any, inputs: torch.Tensor) -> None:
            poll()
            target = ask(name)
            if target is None:
                return
            shape = output_shape(layer, inputs)
            index, known, all_known = positions(name, layer, shape)
            if len(index) != len(target):  # an expert, which is given other tokens now
                return
            problem = Problem(
                lambda first, end: input_rows(inputs, layer, index[first:end]),
                self.with_stream(name, streams, target, shape, index, -1),
                softness(inside.get(name), fan_in(layer), inputs.device),
                known,
                self.processes,
                all_known,
            )
            self.renew(name, problem, written.get(name), before)

        try:
            with relayed(dense_pass) as ask, self.hooked(self.masked.model, fit, streams, after=False):
                self.masked.forward(weights, x, timesteps, condition)
        except BaseException:
            self.restore(before)
            raise
        return before

    def restore(self, weights: Weights) -> None:
        """Take a fit back."""
        for name, tensor in weights.items():
            self.masked.weights[name].data.copy_(tensor)

    @contextmanager
    def hooked(self, model: nn.Module, visit: Any, streams: Streams, *, after: bool) -> Iterator[None]:
        """Call `visit(name, layer, inputs[, output])` at every layer; note streams as they pass."""
        hooks = []
        carriers: dict[str, set[Carrier]] = {}
        for carrier in self.residuals.values():
            carriers.setdefault(carrier.module, set()).add(carrier)
        gone = [group for group in self.masked.groups if group.is_block and not self.masked.gates[group.name]]
        waiting: dict[str, set[str]] = {}  # stream -> layers that have not seen it yet

        def visit_and_let_go(name: str, *seen: Any) -> None:
            visit(name, *seen)
            carrier = self.residuals.get(name)
            if carrier is not None:
                waiting[carrier.key].discard(name)
                if not waiting[carrier.key]:
                    streams.pop(carrier.key, None)

        for name, module in model.named_modules():
            hooks += [carrier.watch(module, streams) for carrier in carriers.get(name, ())]
            left = name not in (self.repeated or ()) and not any(block.holds(name) for block in gone)
            if is_fittable(module) and left:
                hooks.append(layer_hook(name, module, visit_and_let_go, after=after))
                if name in self.residuals:
                    waiting.setdefault(self.residuals[name].key, set()).add(name)
        with hooked(hooks):
            yield

    def routes(self, calls: Calls, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> bool:
        """Whether another sample goes to other layers than the first, or gives them other shapes."""
        second = slice(1, 2)
        given = x[second], timesteps[second], some_of(condition, second)
        return len(x) > 1 and layer_calls(self.dense, *given) != calls

    def with_stream(
        self,
        name: str,
        streams: Streams,
        rows: torch.Tensor,
        shape: Sequence[int],
        index: torch.Tensor,
        sign: int,
    ) -> torch.Tensor:
        """rows + sign * the stream that a layer's outputs are added to, if that can be seen."""
        carrier = self.residuals.get(name)
        stream = streams.get(carrier.key) if carrier else None
        found = None if stream is None else as_rows(stream, rows.shape[1], shape, index)
        return rows if found is None else rows + sign * found

    def renew(
        self,
        name: str,
        problem: Problem,
        written: torch.Tensor | None,
        before: Weights,
    ) -> None:
        """Give a layer its new weights, those under masks included; outputs at mask 0 keep theirs."""
        own = {key: self.masked.weights.get(f"{name}.{key}") for key in ("weight", "bias")}
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        rows = torch.arange(len(weight)) if written is None else torch.nonzero(written > 0).flatten()
        rows = rows.to(weight.device)
        matrix = wide(weight.detach()).flatten(1)[rows]
        offset = None if bias is None else bias.detach()[rows]
        found = problem.of_outputs(rows).solve(matrix.float(), None if offset is None else offset.float())
        if found is None:
            return
        for key, values in zip(("weight", "bias"), found, strict=True):
            parameter = own[key]
            if parameter is None or values is None:
                continue
            full = f"{name}.{key}"
            before[full] = parameter.detach().clone()
            whole = wide(parameter.detach()).clone()
            whole = whole.flatten(1) if key == "weight" else whole
            whole[rows] = values.to(whole.dtype)
            parameter.data.copy_(whole.view(parameter.shape))


def shared_rows(
    own: range, total: int, shape: Sequence[int], wanted: int, source: torch.Generator
) -> tuple[torch.Tensor, int, int]:
    """The same positions of a layer's outputs in both networks, for the samples that one process looks at.

    Args:
        own: numbers of these samples, of `total`.
        shape: from `places`, of these samples; wanted: positions in all of them.

    Returns:
        (positions, ascending; how many of them do not lie in the last samples, which only judge; the same of
        all samples).
    """
    first, *rest = shape
    whole = (first * total // max(1, len(own)), *rest)
    index = rows_drawn(whole, wanted, source)
    start = torch.Size(whole).numel() * own.start // total
    here = index[(index >= start) & (index < start + torch.Size(shape).numel())]
    return here - start, judged_from(here, whole), judged_from(index, whole)


def layer_calls(model: nn.Module, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> Calls:
    """Layer -> shape of what it is given, each time that it runs in a pass."""
    calls: Calls = {}

    def note(name: str, _layer: Any, given: torch.Tensor) -> None:
        calls.setdefault(name, []).append(given.shape)

    layers = ((name, module) for name, module in model.named_modules() if is_fittable(module))
    with hooked(layer_hook(name, module, note, after=False) for name, module in layers):
        call(model, x, timesteps, condition)
    return calls


def softness(mask: torch.Tensor | None, inputs: int, device: torch.device) -> torch.Tensor | None:
    """[inputs] (1 - m) / m of the unit behind each input; None where every mask is 0 or 1."""
    if mask is None or bool(((mask == 0) | (mask == 1)).all()):
        return None
    odds = torch.where(mask > 0, (1 - mask) / mask.clamp_min(1e-6), torch.zeros_like(mask))
    return odds.repeat_interleave(inputs // len(mask)).to(device)


def judged_from(index: torch.Tensor, shape: Sequence[int]) -> int:
    """The first row that lies in one of the last samples, which only judge."""
    sample = index // (torch.Size(shape).numel() // shape[0])
    return int((sample < shape[0] - max(1, shape[0] // JUDGES)).sum())
