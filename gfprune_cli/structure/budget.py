"""How many channels each group keeps: the widths that meet a budget of parameters, MACs, or both.

`adaptive` gives every group its own width, by score per saved share of what the budget counts.
`native` keeps to widths that the stock diffusers class can express (see `structure.native`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.structure.blocks import floor_of_stack, inside
from gfprune_cli.structure.cost import COUNTED, Budget, CostModel, Counted
from gfprune_cli.structure.groups import ChannelGroup, keep_all

HEAD_ALIGN = 8
TOLERANCE = 0.01  # of the dense cost
FLOORS = (0.5, 0.25, 0.0)  # of the uniform width ratio: no group is starved while another is untouched
ADVICES = 5  # tries to name a sparsity that can be reached
BISECTIONS = 7  # of the weight that parameters and MACs have beside each other


@dataclass(frozen=True)
class Allocation:
    """Channels kept by each group, and the share that goes of what the budget counts.

    Args:
        sparsity: of the cost that binds.
        sparsities: cost -> share of it that goes.
    """

    kept: Mapping[str, int]
    sparsity: float
    sparsities: Mapping[Counted, float]


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
    budget: Budget = "both",
    align: int = 1,
    strict: bool = True,
) -> Allocation:
    """Spend the budget where the least score is lost per saved parameter and MAC.

    Greedy with exact costs: after each step the savings of every group are those of the network that is
    left. At most 1 - sparsity of everything that the budget counts stays. Where it counts parameters and
    MACs, how much a share of one is worth beside a share of the other is found by bisection, so that both
    run out together.

    Args:
        scores: group name -> [units].
        strict: False for a budget on the way, where the nearest reachable serves.

    Raises:
        UsageError: the budget cannot be reached; names the nearest reachable sparsity.
    """
    found, nearest = attempt(cost, scores, sparsity, budget, align, strict=strict)
    for _ in range(ADVICES):
        if found is not None:
            break
        advised = rounded_down(nearest.sparsity)  # what an error names has to be accepted
        accepted, other = attempt(cost, scores, advised, budget, align, strict=True)
        if accepted is not None:
            break
        nearest = other
    if found is None:
        raise UsageError(unreachable(sparsity, budget, nearest))
    return found


def attempt(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    budget: Budget,
    align: int,
    *,
    strict: bool,
) -> tuple[Allocation | None, Allocation]:
    """(widths that meet a budget, None if there are none; the nearest to it)."""
    best: Allocation | None = None
    while True:
        for floor in FLOORS:
            depth = floor * math.sqrt(1 - sparsity)
            found = Search(cost, scores, 1 - sparsity, COUNTED[budget], align, depth).cheapest(strict=strict)
            if not strict or 0 <= found.sparsity - sparsity <= TOLERANCE:
                return found, found
            if best is None or abs(found.sparsity - sparsity) < abs(best.sparsity - sparsity):
                best = found
        assert best is not None
        if align == 1:
            return None, best
        align //= 2


def rounded_down(sparsity: float) -> float:
    """To the three digits that a message shows."""
    return math.floor(sparsity * 1000) / 1000


def unreachable(sparsity: float, budget: Budget, nearest: Allocation) -> str:
    """What to say of a budget that no widths meet."""
    shares = ", ".join(f"{share:.3f} of {key}" for key, share in nearest.sparsities.items())
    several = f" (which removes {shares})" if len(nearest.sparsities) > 1 else ""
    return (
        f"--sparsity {sparsity:g} of {budget} cannot be reached: the nearest is "
        f"{rounded_down(nearest.sparsity):.3f}{several}. Ask for that, or use another --budget"
    )


@dataclass
class Search:
    """Widths that keep at most a share of every cost that is counted, at the least loss of score.

    Args:
        left: the share that may stay.
        counted: the costs.
        depth: share of the uniform width ratio that every group keeps, and of the blocks of a stack.
    """

    cost: CostModel
    scores: Mapping[str, torch.Tensor]
    left: float
    counted: tuple[Counted, ...]
    align: int
    depth: float

    def __post_init__(self) -> None:
        self.groups = self.cost.groups
        self.minimum = minimum_widths(self.cost, self.depth, self.align)
        self.dense = {key: self.cost.total({}, key) for key in self.counted}
        self.losses = {name: step_scores(group, self.scores[name]) for name, group in self.groups.items()}

    def cheapest(self, *, strict: bool) -> Allocation:
        """The best of what the weights of the costs lead to.

        One that runs out before the other has too little weight.
        """
        if len(self.counted) == 1:
            return self.landed({self.counted[0]: 1.0}, strict=strict)
        first, second = self.counted
        low, high = 0.0, 1.0
        found: list[tuple[float, int, Allocation]] = []

        def priced(weight: float) -> Allocation:
            one = self.landed({first: weight, second: 1 - weight}, strict=strict)
            found.append((self.lost(one.kept), len(found), one))
            return one

        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            one = priced(weight)
            if one.sparsities[first] > one.sparsities[second]:
                high = weight
            else:
                low = weight
        for weight in (0.0, 1.0):  # where one cost alone binds, its price alone is the best
            priced(weight)
        reached = [entry for entry in found if entry[2].sparsity >= 1 - self.left] or [
            (-entry[2].sparsity, *entry[1:]) for entry in found
        ]
        return min(reached, key=lambda entry: entry[:2])[2]

    def lost(self, kept: Mapping[str, int]) -> float:
        """Score of all that goes."""
        return sum(
            sum(self.losses[name][: (group.channels - kept[name]) // group.step])
            for name, group in self.groups.items()
        )

    def shares(self, kept: Mapping[str, int]) -> dict[Counted, float]:
        return {key: self.cost.total(kept, key) / self.dense[key] for key in self.counted}

    def room(self, kept: Mapping[str, int]) -> float:
        """How far below the budget the cost that binds is."""
        return self.left - max(self.shares(kept).values())

    def landed(self, weights: Mapping[Counted, float], *, strict: bool) -> Allocation:
        """Down to the budget, then up again as far as it goes."""
        kept = self.refill(self.descend(weights))
        if strict and self.room(kept) > TOLERANCE:
            patient = self.refill(self.descend(weights, patient=True))
            kept = patient if 0 <= self.room(patient) < self.room(kept) else kept
        for granularity in dict.fromkeys((self.align, 1)):  # aligned moves first: they cost no speed
            if strict and self.room(kept) > TOLERANCE:
                kept = self.exchange(kept, granularity)
        shares = self.shares(kept)
        return Allocation(kept, 1 - max(shares.values()), {key: 1 - share for key, share in shares.items()})

    def descend(self, weights: Mapping[Counted, float], *, patient: bool = False) -> dict[str, int]:
        """Remove one step at a time, cheapest score per saving first, until the budget is met.

        Args:
            weights: what a share of each cost is worth.
            patient: what would take more than is wanted waits until nothing else is left.
        """
        cost, kept = self.cost, keep_all(self.groups.values())
        removed = cost.removed(kept)
        shares = self.shares(kept)
        open_groups = set(kept)
        rates: dict[str, tuple[float, dict[Counted, float]]] = {}
        while open_groups and max(shares.values()) > self.left:
            for name in open_groups - rates.keys():
                rates[name] = self.rate(name, removed, self.step_down(name, kept), weights)
            waits = {one for one in open_groups if patient and self.excess(shares, rates[one][1]) > TOLERANCE}
            if open_groups == waits:  # what takes least too much
                name = min(waits, key=lambda one: (self.excess(shares, rates[one][1]), one))
            else:
                name = min(open_groups - waits, key=lambda one: (rates[one][0], one))
            step = self.step_down(name, kept)
            if kept[name] - step < self.minimum[name] or not may_go(cost, name, kept, self.depth):
                open_groups.discard(name)
                continue
            for key, saving in rates[name][1].items():
                shares[key] -= saving
            affected = neighbours(cost, name)
            kept[name] -= step
            removed[name] += step
            for other in affected:
                rates.pop(other, None)
                if self.groups[name].stack and inside(self.groups[other], name):
                    open_groups.discard(other)  # it goes with the block
                    kept[other], removed[other] = self.groups[other].channels, 0
        return kept

    def excess(self, shares: Mapping[Counted, float], savings: Mapping[Counted, float]) -> float:
        """How far below the budget a step would end."""
        return self.left - max(shares[key] - saving for key, saving in savings.items())

    def step_down(self, name: str, kept: Mapping[str, int]) -> int:
        return step_down(self.groups[name], kept[name], self.align)

    def rate(
        self, name: str, removed: dict[str, int], step: int, weights: Mapping[Counted, float]
    ) -> tuple[float, dict[Counted, float]]:
        """(score lost per weighted share of cost, share of each cost saved) by the next step of a group."""
        group = self.groups[name]
        first = removed[name] // group.step
        lost = sum(self.losses[name][first : first + step // group.step])
        after = {**removed, name: removed[name] + step}
        savings = {
            key: (self.cost.of_group(name, removed, key) - self.cost.of_group(name, after, key)) / dense
            for key, dense in self.dense.items()
        }
        worth = sum(weights[key] * saving for key, saving in savings.items())
        return (lost / worth if worth else math.inf), savings

    def refill(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Give back the steps that score most, as long as the budget holds: the last step down overshoots."""
        kept = dict(kept)
        removed = self.cost.removed(kept)
        totals = {key: self.cost.total(kept, key) for key in self.counted}
        names = [name for name, group in self.groups.items() if not group.stack]
        while names:
            fitting = {}
            for name in names:
                group = self.groups[name]
                up = kept[name] + width_step(group, self.align)
                if up <= group.channels and self.fits(after := self.totals_after(name, up, removed, totals)):
                    gone = (group.channels - kept[name]) // group.step
                    lost = sum(self.losses[name][gone - (up - kept[name]) // group.step : gone])
                    fitting[name] = lost, up, after
            names = list(fitting)  # what does not fit now never will: room shrinks, and steps only cost more
            if names:
                name = max(names, key=lambda candidate: (fitting[candidate][0], candidate))
                _, kept[name], totals = fitting[name]
                removed[name] = self.groups[name].channels - kept[name]
        return kept

    def fits(self, totals: Mapping[Counted, int]) -> bool:
        return max(total / self.dense[key] for key, total in totals.items()) <= self.left

    def totals_after(
        self, name: str, width: int, removed: Mapping[str, int], totals: Mapping[Counted, int]
    ) -> dict[Counted, int]:
        """The costs once one group has another width: only the layers that it touches are counted again."""
        after = {**removed, name: self.groups[name].channels - width}
        return {
            key: total + self.cost.of_group(name, after, key) - self.cost.of_group(name, removed, key)
            for key, total in totals.items()
        }

    def exchange(self, kept: Mapping[str, int], align: int) -> dict[str, int]:
        """Land nearer below the budget by giving a step back to one group and taking one from another.

        Small networks have few steps, and the greedy path can end a step short of the tolerance.
        """
        best = dict(kept)
        room = self.room(best)
        names = [name for name, group in self.groups.items() if not group.stack and not narrows_a_head(group)]
        moves = [{a: 1} for a in names] + [{a: 1, b: -1} for a in names for b in names if a != b]
        for move in moves:
            trial = dict(kept)
            for name, direction in move.items():
                step = width_step(self.groups[name], align)
                trial[name] += step if direction > 0 else -step_down(self.groups[name], trial[name], align)
            if any(not self.minimum[name] <= trial[name] <= self.groups[name].channels for name in move):
                continue
            distance = self.room(trial)
            if 0 <= distance < room or room < 0 <= distance:
                best, room = trial, distance
        return best


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


def may_go(cost: CostModel, name: str, kept: Mapping[str, int], depth: float) -> bool:
    """Whether a block may go without emptying its stack; channels always may."""
    stack = cost.groups[name].stack
    if not stack:
        return True
    left = [kept[other] for other, group in cost.groups.items() if group.stack == stack]
    return sum(left) > floor_of_stack(len(left), depth)


def neighbours(cost: CostModel, name: str) -> set[str]:
    """Groups whose savings change when this one narrows: those that share a layer with it."""
    layers = [cost.layers[index] for index in cost.layers_of[name]]
    around = {block for layer in layers for block in layer.blocks}
    return around | {group for layer in layers for group, _ in (*layer.out.shares, *layer.into.shares)}
