"""The widths that keep at most a share of every cost that is counted, at the least loss of score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from gfprune_cli.structure.blocks import floor_of_stack
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.ledger import Ledger
from gfprune_cli.structure.steps import minimum_width, narrows_a_head, step_down, width_step
from gfprune_cli.structure.times import Floats, Ints

TOLERANCE = 0.01  # of the dense cost
BLOCKS_KEPT = 0.5  # of the uniform width ratio: the least share of a stack, whatever widths keep
STEPS = 128  # that the way down of a group has, at least
BISECTIONS = 7  # of the weight that two costs have beside each other
Weights = dict[str, float]  # cost -> what a share of it is worth


@dataclass(frozen=True)
class Allocation:
    """Channels kept by each group, and the share that goes of what the budget counts.

    Args:
        sparsity: of the cost that binds.
        sparsities: cost -> share of it that goes.
    """

    kept: Mapping[str, int]
    sparsity: float
    sparsities: Mapping[str, float]


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


class Search:
    """Greedy with exact costs: after each step the savings of every group are those of the network left.

    Args:
        scores: group name -> [units].
        left: cost -> the share of it that may stay.
        align: see `width_step`.
        depth: share of its channels that every group keeps, and of the blocks of a stack at most.
        start: channels by group of the network that narrows further; what is not named has all.
        before: block -> the one that has to be gone before it goes.
    """

    def __init__(
        self,
        cost: CostModel,
        scores: Mapping[str, torch.Tensor],
        left: Mapping[str, float],
        align: int = 1,
        depth: float = 0.0,
        start: Mapping[str, int] | None = None,
        before: Mapping[str, str] | None = None,
    ) -> None:
        self.before = before or {}
        self.cost, self.scores, self.align, self.depth = cost, scores, align, depth
        self.counted, self.left = tuple(left), np.array(list(left.values()))
        self.names = sorted(cost.groups)
        self.groups = [cost.groups[name] for name in self.names]
        self.most = {} if start is None else start
        self.start = self.ledger(self.most)
        self.minimum = [minimum_width(group, depth, align) for group in self.groups]
        self.dense = np.array([cost.before(key) for key in left], np.float64)
        # channels of a step, of groups that may take several at once
        several = [0 if group.is_block else width_step(group, align) for group in self.groups]
        self.several = np.array(several, np.int64)
        # score lost by a group's first steps, 0 of them first
        self.lost_by = [
            list(accumulate(step_scores(group, scores[group.name]), initial=0.0)) for group in self.groups
        ]

    def ledger(self, kept: Mapping[str, int]) -> Ledger:
        return Ledger(self.cost, self.counted, kept)

    def cheapest(self, *, strict: bool) -> Allocation:
        """The best of what the weights of the costs lead to."""
        return self.balanced(strict=strict)[1]

    def balanced(self, *, strict: bool) -> tuple[Weights, Allocation]:
        """What a share of each cost is worth, and where that leads.

        Of two costs, the one that runs out before the other has too little weight. A third one is weighed
        against the balance of the first two.
        """
        *others, key = self.counted
        if not others:
            return {key: 1.0}, self.landed({key: 1.0}, strict=strict)
        mix: Weights = {others[0]: 1.0}
        if len(others) > 1:
            left = dict(zip(others, self.left[:-1], strict=True))
            inner = Search(self.cost, self.scores, left, self.align, self.depth, self.most, self.before)
            mix = inner.balanced(strict=strict)[0]
        found: list[tuple[Weights, Allocation]] = []

        def priced(weight: float) -> Allocation:
            weights = {**{other: weight * share for other, share in mix.items()}, key: 1 - weight}
            found.append((weights, self.landed(weights, strict=strict)))
            return found[-1][1]

        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            one = priced(weight)
            if min(self.excess(one, other) for other in others) > self.excess(one, key):
                high = weight
            else:
                low = weight
        for weight in (0.0, 1.0):  # where one cost alone binds, its price alone is the best
            priced(weight)
        reached = [entry for entry in found if self.excess(entry[1]) >= 0]
        if reached:
            return min(reached, key=lambda entry: self.lost(entry[1].kept))
        return min(found, key=lambda entry: (-self.excess(entry[1]), self.lost(entry[1].kept)))

    def excess(self, found: Allocation, *names: str) -> float:
        """By how much more than was asked of the costs goes; of the named ones, or all."""
        left = zip(self.counted, self.left, strict=True)
        return min(
            found.sparsities[key] - (1 - share) for key, share in left if key in (names or self.counted)
        )

    def lost(self, kept: Mapping[str, int]) -> float:
        """Score of all that goes."""
        return sum(
            lost[(group.channels - kept[group.name]) // group.step]
            for group, lost in zip(self.groups, self.lost_by, strict=True)
        )

    def shares(self, ledger: Ledger) -> Floats:
        found: Floats = ledger.totals / self.dense
        return found

    def room(self, ledger: Ledger) -> float:
        """How far below the budget the cost that binds is."""
        return float((self.left - self.shares(ledger)).min())

    def landed(self, weights: Mapping[str, float], *, strict: bool) -> Allocation:
        """Down to the budget, then up again as far as it goes."""
        ledger = self.refill(self.descend(weights))
        if strict and self.room(ledger) > TOLERANCE:
            patient = self.refill(self.descend(weights, patient=True))
            ledger = patient if 0 <= self.room(patient) < self.room(ledger) else ledger
        for granularity in dict.fromkeys((self.align, 1)):  # aligned moves first: they cost no speed
            if strict and self.room(ledger) > TOLERANCE:
                ledger = self.exchange(ledger, granularity)
        # channels in a block that goes are no longer counted; those that had gone before stay out
        kept = {name: min(width, self.most.get(name, width)) for name, width in ledger.kept().items()}
        left = {key: self.cost.total(kept, key) / self.cost.before(key) for key in self.counted}
        return Allocation(kept, 1 - max(left.values()), {key: 1 - share for key, share in left.items()})

    def descend(self, weights: Mapping[str, float], *, patient: bool = False) -> Ledger:
        """Remove one step at a time, cheapest score per saving first, until the budget is met.

        Args:
            weights: what a share of each cost is worth.
            patient: what would take more than is wanted waits until nothing else is left.
        """
        ledger = self.start.copy()
        prices = np.array([weights[key] for key in self.counted]) / self.dense
        steps = np.array([self.down(number, ledger) for number in range(len(self.names))], np.int64)
        lost = np.array(
            [self.loses(number, int(ledger.removed[number]), int(step)) for number, step in enumerate(steps)]
        )
        closed = np.array([ledger.is_inside_gone(name) for name in self.names])
        waiting = np.array([self.waits(name, ledger) for name in self.names])
        while self.room(ledger) < 0 and not (closed | waiting).all():
            savings = ledger.savings(steps)
            worth = prices @ savings
            rates = np.divide(lost, worth, out=np.full(len(lost), math.inf), where=worth > 0)
            number = self.next_step(
                ledger, savings, rates, np.flatnonzero(~(closed | waiting)), patient=patient
            )
            name, step = self.names[number], int(steps[number])
            kept = self.groups[number].channels - int(ledger.removed[number])
            if kept - step < self.minimum[number] or not self.may_go(name, ledger):
                closed[number] = True
                continue
            for other in ledger.move(name, step, savings[:, number]):
                closed[ledger.index[other]] = True  # it goes with the block
            if self.groups[number].is_block:
                closed[number] = True
                waiting = np.array([self.waits(other, ledger) for other in self.names])
                continue
            steps[number] = self.down(number, ledger)
            lost[number] = self.loses(number, int(ledger.removed[number]), int(steps[number]))
        return ledger

    def next_step(self, ledger: Ledger, savings: Floats, rates: Floats, free: Ints, *, patient: bool) -> int:
        """The group whose step costs least, of those that are free to take one.

        Args:
            rates: [groups] score lost per saving; infinite where a step saves nothing that has a price.
            patient: see `descend`.
        """
        if patient:
            after = self.shares(ledger)[:, None] - savings / self.dense[:, None]
            excess = (self.left[:, None] - after).min(0)
            small = free[excess[free] <= TOLERANCE]
            if not len(small):  # what takes least too much
                return int(free[np.argmin(excess[free])])
            free = small
        return int(free[np.argmin(rates[free])])

    def down(self, number: int, ledger: Ledger) -> int:
        """Channels that a group's next step takes; of a wide group several steps at once.

        One of ten thousand units at a time would take minutes where one in 128 of its own changes no order.
        """
        group = self.groups[number]
        kept, several = group.channels - int(ledger.removed[number]), int(self.several[number])
        step = step_down(group, kept, self.align)
        if not several:
            return step
        more = min(group.channels // several // STEPS - 1, (kept - step - self.minimum[number]) // several)
        return step + several * max(0, more)

    def loses(self, number: int, removed: int, step: int) -> float:
        """Score lost by a step of a group that has lost so many channels; for a negative one, less than 0."""
        size, lost = self.groups[number].step, self.lost_by[number]
        after = min(len(lost) - 1, (removed + step) // size)
        return lost[after] - lost[removed // size]

    def may_go(self, name: str, ledger: Ledger) -> bool:
        """Whether a block may go without emptying its stack; channels always may."""
        stack = self.cost.groups[name].stack
        if not stack:
            return True
        of_stack = [number for number, group in enumerate(self.groups) if group.stack == stack]
        left = len(of_stack) - int(ledger.removed[of_stack].sum())
        ratio = min(self.depth, BLOCKS_KEPT * math.sqrt(self.left.min()))
        return left > floor_of_stack(len(of_stack), ratio)

    def waits(self, name: str, ledger: Ledger) -> bool:
        """Whether a block has to stay until another one has gone."""
        first = self.before.get(name)
        return first is not None and not ledger.removed[ledger.index[first]]

    def up(self, ledger: Ledger) -> Ints:
        """[groups] channels that a step back gives, negative; 0 where there is none to give."""
        return np.where(self.several <= ledger.removed - self.start.removed, -self.several, 0)

    def refill(self, ledger: Ledger) -> Ledger:
        """Give back the steps that score most, as long as the budget holds: the last step down overshoots."""
        barred = np.zeros(len(self.names), bool)
        while True:
            steps = self.up(ledger)
            savings = ledger.savings(steps)
            after = (ledger.totals[:, None] - savings) / self.dense[:, None]
            # what does not fit now never will: room shrinks, and steps only cost more
            barred |= (steps == 0) | (after > self.left[:, None]).any(0)
            if barred.all():
                return ledger
            gains = {
                number: -self.loses(number, int(ledger.removed[number]), int(steps[number]))
                for number in map(int, np.flatnonzero(~barred))
            }  # scores that are not finite have no order, and some step has to be taken all the same
            number = max(gains, key=lambda one: (gains[one], one))
            ledger.move(self.names[number], int(steps[number]), savings[:, number])

    def exchange(self, ledger: Ledger, align: int) -> Ledger:
        """Land nearer below the budget by giving a step back to one group and taking one from another.

        Small networks have few steps, and the greedy path can end a step short of the tolerance.
        """
        kept = ledger.kept()
        best, room = kept, self.room(ledger)
        free = [not group.is_block and not narrows_a_head(group) for group in self.groups]
        down = np.zeros(len(self.groups), np.int64)
        for number, group in enumerate(self.groups):
            step = step_down(group, kept[group.name], align)
            if free[number] and kept[group.name] - step >= self.minimum[number]:
                down[number] = step
        up = np.array([-width_step(group, align) for group in self.groups], np.int64)
        given = ledger.savings(up)
        for number, group in enumerate(self.groups):
            wider = kept[group.name] - int(up[number])
            if not free[number] or wider > group.channels - self.start.removed[number]:
                continue
            trial = ledger.copy()
            trial.move(group.name, int(up[number]), given[:, number])
            savings = trial.savings(np.where(np.arange(len(down)) == number, 0, down))
            after = (trial.totals[:, None] - savings) / self.dense[:, None]
            rooms = (self.left[:, None] - after).min(0)
            for other in (number, *np.argsort(rooms, kind="stable")):
                distance = self.room(trial) if other == number else float(rooms[other])
                if other != number and not down[other]:
                    continue
                if 0 <= distance < room or room < 0 <= distance:
                    best, room = {**kept, group.name: wider}, distance
                    if other != number:
                        best[self.names[other]] -= int(down[other])
        return self.ledger(best)
