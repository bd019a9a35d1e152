"""Whole networks of given widths, timed in turns with the dense one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from gfprune_cli.progress import Event, Progress
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.groups import select
from gfprune_cli.structure.removal import remove
from gfprune_cli.timing.random_weights import with_random_weights
from gfprune_cli.timing.runtimes import Bench
from gfprune_cli.timing.stopwatch import network_seconds

Build = Callable[[nn.Module, Mapping[str, int]], nn.Module]


class WholeNetworks:
    """Makes and times candidates: weights do not matter for time.

    Args:
        reference: the structure of what they are compared with.
        network: the structure that is narrowed, where it is another (a folded one).
        build: (network, channels kept) -> the narrow network; by default as `remove` makes it.
    """

    def __init__(
        self,
        cost: CostModel,
        bench: Bench,
        progress: Progress,
        reference: nn.Module,
        network: nn.Module | None = None,
        build: Build | None = None,
    ) -> None:
        self.cost, self.bench, self.progress = cost, bench, progress
        dense = with_random_weights(reference)
        self.wide = dense if network is None else with_random_weights(network)
        self.build = build or self.narrowed
        self.reference = bench.network(dense)

    def narrowed(self, wide: nn.Module, kept: Mapping[str, int]) -> nn.Module:
        groups = self.cost.groups.values()
        units = {group.name: select(group, torch.ones(group.units), kept[group.name]) for group in groups}
        return remove(wide, tuple(groups), units)

    def seconds(self, widths: Sequence[Mapping[str, int]]) -> list[list[float]]:
        """Seconds of the reference, and of the network at each choice of widths; turn by turn."""
        self.progress(Event("time", text="timing whole networks"))
        calls = [self.bench.network(self.build(self.wide, kept)) for kept in widths]
        return network_seconds([self.reference, *calls], self.bench.device, self.progress)

    def end(self) -> None:
        """Give back what the runtime keeps."""
        self.bench.end()
