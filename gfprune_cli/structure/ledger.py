"""What the next step of every group would save, kept up to date while the widths of a network change."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gfprune_cli.structure.blocks import inside
from gfprune_cli.structure.cost import CostModel, LayerCost
from gfprune_cli.structure.times import Floats, Ints


class Ledger:
    """The widths of a network and what they cost, for searches that ask thousands of times.

    `CostModel` counts one choice of widths; this counts what each group's step would save in each cost, all
    groups at once. With o the outputs and i the inputs of a layer, of which one channel of the group takes a
    and b, s channels less save what the layer costs at (o, i) over what it costs at (o - a s, i - b s).

    Args:
        cost: counts the layers.
        counted: the costs to keep.
        kept: channels by group; what is not named keeps all.

    Attributes:
        names: of the groups, in alphabetical order, which is that of every array.
        removed: [groups] channels that are gone.
        totals: [costs].
    """

    def __init__(self, cost: CostModel, counted: Sequence[str], kept: Mapping[str, int]) -> None:
        self.cost, self.counted = cost, tuple(counted)
        self.names = sorted(cost.groups)
        self.index = {name: number for number, name in enumerate(self.names)}
        layers = cost.layers
        self.prices = [cost.prices(key) for key in self.counted]
        self.out, self.into = (
            np.array([getattr(layer, side).size for layer in layers], np.int64) for side in ("out", "into")
        )
        self.gone = np.zeros(len(layers), np.int64)  # blocks around a layer that are gone
        entries = [
            (self.index[name], number, *shares)
            for number, layer in enumerate(layers)
            for name, shares in shares_of(layer).items()
        ]
        self.group, self.layer, self.a, self.b = np.array(entries, np.int64).reshape(-1, 4).T
        self.blocks = {name: cost.layers_of[name] for name, group in cost.groups.items() if group.is_block}
        self.contents = {
            block: [name for name, group in cost.groups.items() if inside(group, cost.groups[block])]
            for block in self.blocks
        }
        self.removed = np.zeros(len(self.names), np.int64)
        for name, left in kept.items():
            self.narrow(name, cost.groups[name].channels - left)
        start = self.kept()
        self.totals = np.array([cost.total(start, key) for key in self.counted], np.float64)

    def copy(self) -> "Ledger":
        """One more of the same widths, to go its own way."""
        other = copy.copy(self)
        other.out, other.into, other.gone = self.out.copy(), self.into.copy(), self.gone.copy()
        other.removed = self.removed.copy()
        return other

    def savings(self, steps: Ints) -> Floats:
        """[costs, groups] what each group would save by so many channels less; a block by its one.

        Args:
            steps: [groups], negative for channels that come back.
        """
        step, layer = steps[self.group], self.layer
        alive = self.gone[layer] == 0
        out, into = self.out[layer], self.into[layer]
        less = out - self.a * step, into - self.b * step
        found = np.zeros((len(self.counted), len(self.names)))
        for number, price in enumerate(self.prices):
            saved = (price.of(layer, out, into) - price.of(layer, *less)) * alive
            found[number] = np.bincount(self.group, saved, len(self.names))
        for block, layers in self.blocks.items():
            if self.removed[self.index[block]] == 0:
                found[:, self.index[block]] = self.of_layers(layers)
        return found

    def of_layers(self, layers: Iterable[int]) -> Floats:
        """[costs] of these layers as they are."""
        chosen = np.array([number for number in layers if not self.gone[number]], np.int64)
        out, into = self.out[chosen], self.into[chosen]
        return np.array([price.of(chosen, out, into).sum() for price in self.prices], np.float64)

    def move(self, name: str, step: int, saved: Floats) -> list[str]:
        """Take a step whose savings, [costs], are known; returns the groups that went with a block."""
        self.totals = self.totals - saved
        return self.narrow(name, step)

    def narrow(self, name: str, step: int) -> list[str]:
        """Channels less, without their cost."""
        if not step:
            return []
        number = self.index[name]
        self.removed[number] += step
        if name in self.blocks:
            self.gone[self.blocks[name]] += step
            for other in self.contents[name]:
                self.narrow(other, -int(self.removed[self.index[other]]))
            return self.contents[name]
        mine = self.group == number
        self.out[self.layer[mine]] -= self.a[mine] * step
        self.into[self.layer[mine]] -= self.b[mine] * step
        return []

    def is_inside_gone(self, name: str) -> bool:
        """Whether a group is a block that has gone, or a part of one."""
        gone = [block for block in self.blocks if self.removed[self.index[block]]]
        return any(name == block or name in self.contents[block] for block in gone)

    def kept(self) -> dict[str, int]:
        """Channels by group, in the order of the cost model."""
        return {
            name: group.channels - int(self.removed[self.index[name]])
            for name, group in self.cost.groups.items()
        }


def shares_of(layer: LayerCost) -> dict[str, list[int]]:
    """Group -> outputs and inputs of a layer that one of its channels takes."""
    taken: dict[str, list[int]] = {}
    for number, side in enumerate((layer.out, layer.into)):
        for name, share in side.shares:
            taken.setdefault(name, [0, 0])[number] += share
    return taken
