"""Parameters, multiply-accumulates and time of a network as a function of the channels each group keeps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gfprune_cli.runtime.memory import parameter_count
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.norms import NORMS, feature_count, is_feature_norm
from gfprune_cli.structure.times import Ints, LayerTimes
from gfprune_cli.structure.trace import CONVOLUTIONS, FUSED, Trace, is_attention


@dataclass(frozen=True)
class Dimension:
    """One dimension of a weight: its size, and how many positions each group's channel takes in it."""

    size: int
    shares: tuple[tuple[str, int], ...] = ()

    def kept(self, removed: Mapping[str, int]) -> int:
        return self.size - sum(share * removed[group] for group, share in self.shares)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: `weight` numbers per (out, in) pair, `bias` per out, at `positions` places."""

    name: str
    out: Dimension
    into: Dimension
    weight: int
    bias: int
    positions: int
    learned: bool = True  # False: a product of activations, with MACs but no parameters
    blocks: tuple[str, ...] = ()  # residual blocks around it that may go as a whole

    def gone(self, removed: Mapping[str, int]) -> bool:
        return any(removed[block] for block in self.blocks)


@dataclass(frozen=True)
class Cost:
    """Something that a budget may count: of a layer with o outputs and i inputs, o i p + o q.

    Args:
        per_pair: p of a layer: what each pair of an output and an input costs.
        per_output: q of a layer: what each output costs.
        counts_the_rest: whether parameters of no layer count, too.
    """

    per_pair: Callable[[LayerCost], int]
    per_output: Callable[[LayerCost], int]
    counts_the_rest: bool = False

    def of_layer(self, layer: LayerCost, removed: Mapping[str, int]) -> int:
        """What is left of the cost of a layer when channels of each group are gone."""
        if layer.gone(removed):
            return 0
        out = layer.out.kept(removed)
        return out * layer.into.kept(removed) * self.per_pair(layer) + out * self.per_output(layer)


COSTS: dict[str, Cost] = {
    "params": Cost(
        lambda layer: layer.weight * layer.learned,
        lambda layer: layer.bias * layer.learned,
        counts_the_rest=True,
    ),
    "macs": Cost(lambda layer: layer.weight * layer.positions, lambda layer: 0),
}
BOTH = ("params", "macs")
TIME = "time"  # the cost of a network that was timed: milliseconds


class Products:
    """A row of `COSTS` for given layers, many at once."""

    def __init__(self, cost: Cost, layers: Sequence[LayerCost]) -> None:
        self.pairs = np.array([cost.per_pair(layer) for layer in layers])
        self.outputs = np.array([cost.per_output(layer) for layer in layers])

    def of(self, layers: Ints, out: Ints, into: Ints) -> Any:
        """What these layers cost at these widths, exactly."""
        return (self.pairs[layers] * into + self.outputs[layers]) * out


def counted(budget: str) -> tuple[str, ...]:
    """The costs that a budget holds down: both, or the one that it names."""
    return BOTH if budget == "both" else (budget,)


class CostModel:
    """Exact parameter and MAC counts for any choice of widths.

    MACs are those of one sample: convolutions, linear layers, and both attention products
    (queries x keys and weights x values). Norms, activations and resampling are not counted.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[ChannelGroup, ...],
        trace: Trace,
        dense: "CostModel | None" = None,
    ) -> None:
        """Args: dense: of what the model was before it was folded; shares are of that."""
        self.dense = dense or self
        self.times: LayerTimes | None = None  # of `layers`, where the network was timed
        self.groups = {group.name: group for group in groups}
        shares: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self.layers_of: dict[str, list[int]] = {group.name: [] for group in groups}
        for group in groups:
            for member in () if group.is_block else group.members:
                share = len(member.positions) // group.channels
                shares.setdefault((member.module, member.side), []).append((group.name, share))
        self.layers: list[LayerCost] = []
        for name, module in model.named_modules():
            if (layer := layer_cost(name, module, shares, trace)) is not None:
                self.add(layer)
        for name, parameter in model.named_parameters():
            if (name, "out") in shares:  # a table of its own
                out = Dimension(parameter.shape[-1], tuple(shares[name, "out"]))
                self.add(LayerCost(name, out, Dimension(parameter.numel() // out.size), 1, 0, 0))
        self.place_in_blocks(model)
        whole, params = dict.fromkeys(self.groups, 0), COSTS["params"].of_layer
        in_layers = sum(params(layer, whole) for layer in self.layers)
        self.fixed_params = parameter_count(model) - in_layers

    def add(self, layer: LayerCost) -> None:
        """Count a layer, and note which groups touch it."""
        for group in {name for name, _ in (*layer.out.shares, *layer.into.shares)}:
            self.layers_of[group].append(len(self.layers))
        self.layers.append(layer)

    def place_in_blocks(self, model: nn.Module) -> None:
        """Note in which removable blocks each layer lies, and count what else a block holds."""
        for block, group in self.groups.items():
            if not group.is_block:
                continue
            whole, in_layers = dict.fromkeys(self.groups, 0), 0
            for index, layer in enumerate(self.layers):
                if group.holds(layer.name):
                    in_layers += COSTS["params"].of_layer(layer, whole)
                    self.layers[index] = replace(layer, blocks=(*layer.blocks, block))
                    self.layers_of[block].append(index)
            parts = [model.get_submodule(member.module) for member in group.members]
            rest = sum(map(parameter_count, parts)) - in_layers
            self.layers_of[block].append(len(self.layers))
            self.layers.append(LayerCost(block, Dimension(1), Dimension(rest), 1, 0, 0, blocks=(block,)))

    def before(self, key: str) -> float:
        """All of a cost: what shares are shares of."""
        return self.dense.total({}, key)

    def removed(self, kept: Mapping[str, int]) -> dict[str, int]:
        return {name: group.channels - kept.get(name, group.channels) for name, group in self.groups.items()}

    def params(self, kept: Mapping[str, int]) -> int:
        return self.total(kept, "params")

    def macs(self, kept: Mapping[str, int]) -> int:
        return self.total(kept, "macs")

    def total(self, kept: Mapping[str, int], name: str) -> Any:
        """One cost of the whole network, by its name in `COSTS` or `TIME`: a number, whole but for time."""
        fixed = self.fixed_params if name in COSTS and COSTS[name].counts_the_rest else 0
        return fixed + self.of_layers(range(len(self.layers)), self.removed(kept), name)

    def gone(self, kept: Mapping[str, int], names: Iterable[str]) -> dict[str, float]:
        """Share of each of some costs that goes."""
        return {name: 1 - self.total(kept, name) / self.before(name) for name in names}

    def of_group(self, group: str, removed: Mapping[str, int], name: str) -> Any:
        """One cost of the layers that a group touches."""
        return self.of_layers(self.layers_of[group], removed, name)

    def of_layers(self, numbers: Iterable[int], removed: Mapping[str, int], name: str) -> Any:
        """One cost of some layers when channels of each group are gone."""
        if name != TIME:
            return sum(COSTS[name].of_layer(self.layers[number], removed) for number in numbers)
        alive = [number for number in numbers if not self.layers[number].gone(removed)]
        widths = [
            (layer.out.kept(removed), layer.into.kept(removed))
            for layer in map(self.layers.__getitem__, alive)
        ]
        out, into = np.array(widths, np.int64).reshape(-1, 2).T
        return float(self.prices(TIME).of(np.array(alive, np.int64), out, into).sum())

    def prices(self, name: str) -> Products | LayerTimes:
        """One cost as a function of layers and their widths."""
        if name != TIME:
            return Products(COSTS[name], self.layers)
        assert self.times is not None, "a network that was not timed"
        return self.times


def layer_cost(
    name: str, module: Any, shares: Mapping[tuple[str, str], list[tuple[str, int]]], trace: Trace
) -> LayerCost | None:
    """The cost of one module; None for one without weights of its own."""

    def dimension(side: str, size: int) -> Dimension:
        return Dimension(size, tuple(shares.get((name, side), ())))

    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        # a depthwise convolution reads one channel per channel, whatever leaves
        outputs, inputs, *kernel = module.weight.shape
        out, into = dimension("out", outputs), dimension("in", inputs)
        bias, positions = int(module.bias is not None), trace.positions.get(name, 0)
        return LayerCost(name, out, into, math.prod(kernel), bias, positions)
    if isinstance(module, NORMS) and module.weight is not None:
        return LayerCost(name, dimension("out", module.num_channels), Dimension(2), 1, 0, 0)
    if isinstance(module, nn.Embedding):
        entries = Dimension(module.num_embeddings)
        return LayerCost(name, dimension("out", module.embedding_dim), entries, 1, 0, 0)
    if is_feature_norm(module) and module.weight is not None:
        each = 1 + int(getattr(module, "bias", None) is not None)
        return LayerCost(name, dimension("out", feature_count(module)), Dimension(each), 1, 0, 0)
    if name not in trace.attention:
        return None
    if is_attention(module):
        width = Dimension(module.to_q.out_features, tuple(shares.get((f"{name}.to_q", "out"), ())))
    else:
        readers = shares.get((f"{name}.to_out", "in"), ())
        heads = tuple((group, share) for group, share in readers if group == f"{name}.{FUSED}")
        width = Dimension(module.inner_dim, heads)
    return LayerCost(name, width, Dimension(trace.attention[name]), 1, 0, 1, learned=False)
