"""How many channels each group keeps: the widths that meet a parameter or MAC budget.

`adaptive` gives every group its own width, by score per saved parameter (or MAC).
`native` keeps to widths that the stock diffusers class can express (see `structure.native`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.structure.blocks import floor_of_stack, inside
from gfprune_cli.structure.cost import Budget, CostModel
from gfprune_cli.structure.groups import ChannelGroup, keep_all

HEAD_ALIGN = 8
TOLERANCE = 0.01  # of the dense cost
FLOORS = (0.5, 0.25, 0.0)  # of the uniform width ratio: no group is starved while another is untouched


@dataclass(frozen=True)
class Allocation:
    """Channels kept by each group, and the sparsity that this achieves."""

    kept: Mapping[str, int]
    sparsity: float


def step_scores(group: ChannelGroup, scores: torch.Tensor) -> list[float]:
    """Score lost at each step of a group: the lowest unit of every cell first.

    Args:
        scores: [units].

    Returns:
        One number per step, `units per cell` of them.
    """
    ordered = scores.double().cpu()[group.cells].sort(dim=1).values
    losses: list[float] = ordered.sum(0).tolist()
    return losses


def allocate(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    budget: Budget = "params",
    align: int = 1,
    strict: bool = True,
) -> Allocation:
    """Spend the budget where the least score is lost per saved parameter or MAC.

    Greedy with exact costs: after each step the savings of every group are those of the network that is
    left. The last steps are chosen to land nearest to the target.

    Args:
        scores: group name -> [units].
        strict: False for a budget on the way, where the nearest reachable serves.

    Raises:
        UsageError: the budget cannot be reached; names the nearest reachable sparsity.
    """
    dense = cost.total({}, budget)
    target = dense * (1 - sparsity)
    best: Allocation | None = None
    for floor in FLOORS:
        minimum = minimum_widths(cost, floor * math.sqrt(1 - sparsity), align)
        kept = descend(cost, scores, target, minimum, budget, align, floor * math.sqrt(1 - sparsity))
        for granularity in dict.fromkeys((align, 1)):  # aligned moves first: they cost no speed
            if strict and abs(cost.total(kept, budget) - target) > TOLERANCE * dense:
                kept = exchange(cost, kept, target, minimum, budget, granularity)
        found = Allocation(kept, 1 - cost.total(kept, budget) / dense)
        if not strict or abs(found.sparsity - sparsity) <= TOLERANCE:
            return found
        if best is None or abs(found.sparsity - sparsity) < abs(best.sparsity - sparsity):
            best = found
    assert best is not None
    if align > 1:
        return allocate(cost, scores, sparsity, budget=budget, align=align // 2)
    raise UsageError(
        f"--sparsity {sparsity:g} of {budget} cannot be reached: the nearest is {best.sparsity:.3f}. "
        "Ask for that, or use the other --budget"
    )


def width_step(group: ChannelGroup, align: int) -> int:
    """Channels that lie between two widths: whole cells, and a multiple of `align` in a group twice as wide.

    Elsewhere of half of it, a quarter, ...: kernels that work in blocks waste less on a width that is nearly
    aligned. A head that narrows keeps a multiple of 8, which attention kernels ask for, unless `align` is 1.
    """
    if align > 1 and narrows_a_head(group):
        align = math.lcm(align, HEAD_ALIGN)
    while align > 1:
        aligned = math.lcm(group.step, align)
        if group.channels >= 2 * aligned and (group.channels % aligned == 0 or not narrows_a_head(group)):
            return aligned
        align //= 2
    return group.step


def step_down(group: ChannelGroup, kept: int, align: int) -> int:
    """Channels that the next step takes: from a width that is not aligned down to the next one that is."""
    step = width_step(group, align)
    return kept % step or step


def narrows_a_head(group: ChannelGroup) -> bool:
    """Whether the units are the channels of one attention head."""
    return group.unit_size == 1 and any(member.module.endswith("to_q") for member in group.producers)


def minimum_widths(cost: CostModel, ratio: float, align: int) -> dict[str, int]:
    """The floor of every group: at least one step, and at least `ratio` of its channels; none for a block."""
    minimum = {}
    for name, group in cost.groups.items():
        if group.stack:
            minimum[name] = 0
            continue
        step = width_step(group, align)
        minimum[name] = max(step, step * math.ceil(group.channels * ratio / step))
    return minimum


def descend(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    target: float,
    minimum: Mapping[str, int],
    budget: Budget,
    align: int,
    depth: float,
) -> dict[str, int]:
    """Remove one step at a time, cheapest score per saving first, until no step brings the cost nearer.

    Args:
        depth: share of the blocks of a stack that stay.
    """
    kept = keep_all(cost.groups.values())
    losses = {name: step_scores(group, scores[name]) for name, group in cost.groups.items()}
    removed = cost.removed(kept)
    total = float(cost.total(kept, budget))
    open_groups = set(kept)
    rates: dict[str, tuple[float, int]] = {}
    while open_groups:
        for name in sorted(open_groups - rates.keys()):
            rates[name] = step_rate(
                cost, name, losses[name], removed, step_down(cost.groups[name], kept[name], align), budget
            )
        name = min(sorted(open_groups), key=lambda candidate: rates[candidate][0])
        saving = rates[name][1]
        step = step_down(cost.groups[name], kept[name], align)
        nearer = abs(total - saving - target) < abs(total - target)
        if kept[name] - step < minimum[name] or not nearer or not may_go(cost, name, kept, depth):
            open_groups.discard(name)
            continue
        affected = neighbours(cost, name)
        kept[name] -= step
        removed[name] += step
        total -= saving
        for other in affected:
            rates.pop(other, None)
            if cost.groups[name].stack and inside(cost.groups[other], name):
                open_groups.discard(other)  # it goes with the block
                kept[other], removed[other] = cost.groups[other].channels, 0
    return kept


def may_go(cost: CostModel, name: str, kept: Mapping[str, int], depth: float) -> bool:
    """Whether a block may go without emptying its stack; channels always may."""
    stack = cost.groups[name].stack
    if not stack:
        return True
    left = [kept[other] for other, group in cost.groups.items() if group.stack == stack]
    return sum(left) > floor_of_stack(len(left), depth)


def exchange(
    cost: CostModel,
    kept: Mapping[str, int],
    target: float,
    minimum: Mapping[str, int],
    budget: Budget,
    align: int,
) -> dict[str, int]:
    """Land nearer to the target by giving a step back to one group and taking one from another.

    Small networks have few steps, and the greedy path can end a step short of the tolerance.
    """
    best = dict(kept)
    error = abs(cost.total(best, budget) - target)
    names = [name for name, group in cost.groups.items() if not group.stack and not narrows_a_head(group)]
    moves = [{a: 1} for a in names] + [{a: 1, b: -1} for a in names for b in names if a != b]
    for move in moves:
        trial = dict(kept)
        for name, direction in move.items():
            step = width_step(cost.groups[name], align)
            trial[name] += step if direction > 0 else -step_down(cost.groups[name], trial[name], align)
        if any(not minimum[name] <= trial[name] <= cost.groups[name].channels for name in move):
            continue
        distance = abs(cost.total(trial, budget) - target)
        if distance < error:
            best, error = trial, distance
    return best


def neighbours(cost: CostModel, name: str) -> set[str]:
    """Groups whose savings change when this one narrows: those that share a layer with it."""
    layers = [cost.layers[index] for index in cost.layers_of[name]]
    around = {block for layer in layers for block in layer.blocks}
    return around | {group for layer in layers for group, _ in (*layer.out.shares, *layer.into.shares)}


def step_rate(
    cost: CostModel, name: str, losses: list[float], removed: dict[str, int], step: int, budget: Budget
) -> tuple[float, int]:
    """(score lost per unit of cost, cost saved) by the next step of one group."""
    group = cost.groups[name]
    first = removed[name] // group.step
    lost = sum(losses[first : first + step // group.step])
    before = cost.of_group(name, removed, budget)
    saving = before - cost.of_group(name, {**removed, name: removed[name] + step}, budget)
    return (lost / saving if saving else math.inf), saving
