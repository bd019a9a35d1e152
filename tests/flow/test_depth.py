"""Blocks are chosen in view of what has gone, and where it is asked for they are neighbours."""

import itertools
from collections.abc import Collection

import pytest
import torch
from torch import nn

from gfprune_cli.flow.depth import Choice, Distance, Greedy
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.structure.groups import ChannelGroup, Member

WIDTH = 6


class Removes(nn.Module):
    """A residual block that takes one direction out of its stream: a second one of its kind finds nothing."""

    def __init__(self, axis: int, share: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(WIDTH))
        with torch.no_grad():
            self.scale[axis] = -share

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + stream * self.scale


class Network(nn.Module):
    """Blocks 1 and 2 do the same work; 0 and 3 do a little, each of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Removes(0, 0.3), Removes(1, 1.0), Removes(1, 1.0), Removes(2, 0.2)])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample)
        return (sample,)  # type: ignore[return-value]


def blocks_of(network: nn.Module) -> tuple[ChannelGroup, ...]:
    whole = torch.zeros(1, dtype=torch.long)
    return tuple(
        ChannelGroup(name, 1, 1, whole.view(1, 1), (Member(name, "out", "gate", whole, whole),), "blocks")
        for name in (f"blocks.{number}" for number in range(len(network.blocks)))
    )


def measured(network: nn.Module) -> Distance:
    torch.manual_seed(0)
    masked = MaskedModel(network, blocks_of(network))
    return Distance(masked, torch.randn(8, WIDTH), torch.zeros(8), None, frozenset(), 3, lambda: None)


def test_samples_count_by_their_importance() -> None:
    distance, gone = measured(Network()), frozenset(["blocks.1"])
    whole, parts = distance(gone), []
    for number in range(8):
        distance.importance = nn.functional.one_hot(torch.tensor(number), 8).float()
        parts.append(distance(gone))
    distance.importance = torch.arange(8.0)
    assert distance(gone) == pytest.approx(sum(number * part for number, part in enumerate(parts)))
    assert whole == pytest.approx(sum(parts))


def choice(names: Collection[str], due: float, *, contiguous: bool = False, most: int = 99) -> Choice:
    """Blocks of one stack that cost the same."""
    names = list(names)
    return Choice({"s": names}, lambda gone: len(gone) / len(names), due, {"s": most}, contiguous)


def test_of_two_blocks_that_do_the_same_work_one_stays() -> None:
    """One by one both look spare; the second is measured again once the first has gone."""
    distance = measured(Network())
    alone = {name: distance(frozenset([name])) for name in distance.masked.gates}
    assert sorted(alone, key=lambda name: alone[name])[:2] == ["blocks.1", "blocks.2"]
    greedy = Greedy(choice(alone, 0.5), distance)
    order = greedy.order()
    assert len({"blocks.1", "blocks.2"} & set(greedy.taken)) == 1
    assert distance(frozenset(greedy.taken)) < distance(frozenset(["blocks.1", "blocks.2"])) / 5
    assert order.rises["blocks.3"] == pytest.approx(alone["blocks.3"], rel=1e-2)


def test_blocks_are_where_they_were_when_all_is_measured() -> None:
    distance = measured(Network())
    gates = {name: float(gate) for name, gate in distance.masked.gates.items()}
    Greedy(choice(gates, 0.5), distance).order()
    assert {name: float(gate) for name, gate in distance.masked.gates.items()} == gates


def test_few_blocks_are_measured_again() -> None:
    """Rises that grow are bounds from below: what is dear stays unmeasured after the first time."""
    asked = 0

    def rises(gone: frozenset[str]) -> float:
        nonlocal asked
        asked += 1
        return sum(4.0 ** int(name) for name in gone)

    greedy = Greedy(choice([str(number) for number in range(10)], 0.5), rises)
    greedy.order()
    assert greedy.taken == ["0", "1", "2", "3", "4"]
    assert asked == 10 + 4


def test_an_inner_block_of_one_that_has_gone_is_not_taken() -> None:
    """It saves nothing any more, and what is due is still to go."""
    cost = {"outer": 2.0, "inner": 1.0, "other": 1.0}

    def saved(gone: frozenset[str]) -> float:
        return sum(cost[name] for name in gone - ({"inner"} if "outer" in gone else set())) / 4

    distance = {"outer": 1.0, "inner": 0.8, "other": 5.0}
    asked = Choice({"a": ["outer", "other"], "b": ["inner"]}, saved, 0.7, {"a": 2, "b": 1})
    greedy = Greedy(asked, lambda gone: sum(distance[name] for name in gone))
    greedy.order()
    assert greedy.taken == ["outer", "other"]


@pytest.mark.parametrize("length", range(1, 7))
def test_neighbours_go_as_the_run_that_costs_least(length: int) -> None:
    """The best run of the length that is due, not what grows from the cheapest block."""
    costs = [3.0, 1.0, 9.0, 2.0, 2.1, 2.2, 2.3, 8.0]
    names = [str(number) for number in range(len(costs))]

    def distance(gone: frozenset[str]) -> float:
        return sum(costs[int(name)] for name in gone)

    greedy = Greedy(choice(names, length / len(names), contiguous=True), distance)
    order = greedy.order()
    runs = [frozenset(names[first : first + length]) for first in range(len(names) - length + 1)]
    assert set(greedy.taken) == min(runs, key=distance)
    chain = [next(name for name in names if name not in order.before)]
    after = {first: name for name, first in order.before.items()}
    while chain[-1] in after:
        chain.append(after[chain[-1]])
    assert sorted(chain) == names
    for count in range(1, len(chain) + 1):
        numbers = sorted(int(name) for name in chain[:count])
        assert all(second - first == 1 for first, second in itertools.pairwise(numbers))


def test_a_stack_keeps_what_it_must() -> None:
    greedy = Greedy(choice([str(number) for number in range(5)], 0.9, most=2), lambda gone: float(len(gone)))
    greedy.order()
    assert len(greedy.taken) == 2
