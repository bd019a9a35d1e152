"""Whole networks of given widths, timed in turns with the dense one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gfprune_cli.progress import Event, Progress
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.groups import select
from gfprune_cli.structure.removal import remove
from gfprune_cli.timing.random_weights import with_random_weights
from gfprune_cli.timing.runtimes import Bench
from gfprune_cli.timing.stopwatch import network_seconds

Timed = Callable[[Sequence[Mapping[str, int]]], list[list[float]]]


@contextmanager
def whole_networks(
    cost: CostModel, bench: Bench, progress: Progress, reference: nn.Module, network: nn.Module | None = None
) -> Iterator[Timed]:
    """What makes and times candidates: widths -> seconds of the reference, and of the network at each.

    Weights do not matter for time.

    Args:
        reference: the structure of what they are compared with.
        network: the structure that is narrowed, where it is another (a folded one).
    """
    dense = with_random_weights(reference)
    wide = dense if network is None else with_random_weights(network)
    groups = tuple(cost.groups.values())
    first = bench.network(dense)

    def narrowed(kept: Mapping[str, int]) -> nn.Module:
        units = {group.name: select(group, torch.ones(group.units), kept[group.name]) for group in groups}
        return remove(wide, groups, units)

    def seconds(widths: Sequence[Mapping[str, int]]) -> list[list[float]]:
        progress(Event("time", text="timing whole networks"))
        calls = [bench.network(narrowed(kept)) for kept in widths]
        return network_seconds([first, *calls], bench.device, progress)

    try:
        yield seconds
    finally:
        bench.end()
