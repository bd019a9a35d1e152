"""Which blocks go together: each choice is measured beside those that have been made before it.

One by one, two blocks that do each other's work both look spare. Here the block with the least rise per
saving goes first, the others are measured again without it, and so on. The rise is the squared distance by
which the network's output moves, which is what groups of channels are compared by, measured instead of worked
out: the curvature of a loss that is a square (see `comparison`).

Rises grow while blocks leave, as what is left has more to do. So the last that is known of a block is a bound
from below, and only blocks whose bound is the least are measured again (lazy greedy: Minoux 1978). Two blocks
that cancel each other, and so go more cheaply together than alone, are not found in this way.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from gfprune_cli.diffusion.conditions import Condition, some_of
from gfprune_cli.flow.mask import MaskedModel

LEAST_RISE = 1e-4  # of the mean rise: what is smaller cannot be told from nothing
Gone = frozenset[str]


@dataclass(frozen=True)
class Choice:
    """What a choice of blocks goes by.

    Args:
        stacks: the blocks of each stack, in the order in which they run.
        saved: share of the network's cost that goes with some blocks.
        due: share of the cost that is to go.
        most: stack -> blocks that may go at most.
        contiguous: those that go of a stack are neighbours.
    """

    stacks: Mapping[str, Sequence[str]]
    saved: Callable[[Gone], float]
    due: float
    most: Mapping[str, int]
    contiguous: bool = False


@dataclass
class Order:
    """The blocks of a network in the order in which they go.

    Args:
        rises: block -> by how much more the output moves when it goes in its turn.
        before: block -> the one of its stack that goes before it; the first of a stack is not named.
    """

    rises: dict[str, float]
    before: dict[str, str]


@dataclass
class Greedy:
    """Chooses blocks one after the other, in view of what has gone.

    Args:
        distance: how far the output moves without some blocks.
        gone: blocks that have left before.
    """

    choice: Choice
    distance: Callable[[Gone], float]
    gone: Gone = frozenset()
    taken: list[str] = field(init=False, default_factory=list)
    rises: dict[str, float] = field(init=False, default_factory=dict)
    savings: dict[str, float] = field(init=False, default_factory=dict)
    distances: dict[str, float] = field(init=False, default_factory=dict)  # of each block when last measured
    moved: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.stack_of = {block: name for name, blocks in self.choice.stacks.items() for block in blocks}
        self.runs = self.best_runs() if self.choice.contiguous else {}

    def order(self) -> Order:
        """Choose until what is due has gone; the others follow by the last that is known of them."""
        known = [block for block in self.stack_of if block not in self.gone]
        stale = dict.fromkeys(known, -1)  # how many had gone when a block was measured last
        while self.choice.saved(self.gone.union(self.taken)) < self.choice.due:
            free = [block for block in known if block not in self.taken and self.may_go(block)]
            block = min(free, key=self.rate, default=None)
            if block is None or self.rate(block) == math.inf:
                break
            if stale[block] < len(self.taken):
                self.measure(block)
                stale[block] = len(self.taken)
            else:
                self.taken.append(block)
                self.moved = self.distances[block]
        return self.completed(known)

    def rate(self, block: str) -> float:
        """Rise per saving, as far as it is known; what was never measured comes first."""
        if block not in self.rises:
            return -math.inf
        saving = self.savings[block]  # none is left of a block within one that has gone
        return self.rises[block] / saving if saving > 0 else math.inf

    def measure(self, block: str) -> None:
        """The rise of a block beside what has gone; never less than before."""
        before = self.gone.union(self.taken)
        self.savings[block] = self.choice.saved(before | {block}) - self.choice.saved(before)
        self.distances[block] = self.distance(before | {block})
        self.rises[block] = max(self.rises.get(block, 0.0), self.distances[block] - self.moved)

    def may_go(self, block: str) -> bool:
        """Whether its stack has one to spare, and it is a neighbour of what has gone where that is asked."""
        stack = self.stack_of[block]
        going = [other for other in self.taken if self.stack_of[other] == stack]
        if len(going) >= self.choice.most[stack]:
            return False
        return not self.choice.contiguous or block in self.neighbours(stack, going)

    def neighbours(self, stack: str, going: Collection[str]) -> list[str]:
        """The blocks by which a run grows: in the best run first, then at both of its ends."""
        blocks = self.choice.stacks[stack]
        run = self.runs[stack]
        left = [block for block in run if block not in going and block not in self.gone]
        out = [number for number, block in enumerate(blocks) if block in going or block in self.gone]
        if not out:
            return left or list(blocks)
        ends = [blocks[n] for n in (min(out) - 1, max(out) + 1) if 0 <= n < len(blocks)]
        return [block for block in ends if block in left] or ends

    def best_runs(self) -> dict[str, list[str]]:
        """Stack -> the run of neighbours that moves the output least, as long as its share of what is due.

        Stacks are looked at in turn, each without the runs of those before it.
        """
        found: dict[str, list[str]] = {}
        whole = self.choice.saved(frozenset(self.stack_of))
        for stack, blocks in self.choice.stacks.items():
            share = min(1.0, self.choice.due / whole) if whole > 0 else 0.0
            length = min(self.choice.most[stack], math.ceil(share * len(blocks)))
            before = self.gone.union(*found.values())
            runs = [list(blocks[first : first + length]) for first in range(len(blocks) - length + 1)]
            runs = [run for run in runs if self.holds(run, blocks)]
            distances = [self.distance(before.union(run)) for run in runs] if len(runs) > 1 else [0.0]
            found[stack] = runs[distances.index(min(distances))]
        return found

    def holds(self, run: Collection[str], blocks: Collection[str]) -> bool:
        """Whether a run holds all that has left of its stack, or as much of it as a run can."""
        left = self.gone & set(blocks)
        return left <= set(run) or set(run) <= left

    def completed(self, blocks: list[str]) -> Order:
        """All blocks in their order: those that were not reached as they would have followed."""
        chains: dict[str, list[str]] = {name: [] for name in self.choice.stacks}
        for block in self.taken:
            chains[self.stack_of[block]].append(block)
        for stack, chain in chains.items():
            rest = [block for block in self.choice.stacks[stack] if block in blocks and block not in chain]
            while rest:
                near = self.neighbours(stack, chain) if self.choice.contiguous else rest
                block = min((one for one in near if one in rest), key=self.rate, default=rest[0])
                chain.append(block)
                rest.remove(block)
        mean = sum(self.rises.values()) / max(1, len(self.rises))
        worst = max(self.rises.values(), default=0.0)
        before = {after: first for chain in chains.values() for first, after in pairwise(chain)}
        rises = {block: self.rises.get(block, worst) + LEAST_RISE * mean for block in blocks}
        return Order(rises, before)


@dataclass
class Distance:
    """How far the output of a masked network moves without some blocks: squares, summed over all samples.

    Args:
        masked: at the masks that it has now, but for those blocks.
        x: [N, ...] noisy samples, timesteps: [N].
        gone: blocks that have left: what is measured starts without them.
        piece: samples that go through the network at once.
        seen: what to call before every pass.
        importance: [N] weights of the samples; None for 1.

    Attributes:
        passes: of all samples through the network.
    """

    masked: MaskedModel
    x: torch.Tensor
    timesteps: torch.Tensor
    condition: Condition
    gone: Gone
    piece: int
    seen: Callable[[], None]
    importance: torch.Tensor | None = None
    passes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.with_all = self.outputs(self.gone)

    def __call__(self, gone: Gone) -> float:
        pairs = zip(self.outputs(gone), self.with_all, strict=True)
        moved = [(here - there).double().square().flatten(1).sum(1) for here, there in pairs]
        squares = torch.cat(moved)
        return float((squares if self.importance is None else squares * self.importance.to(squares)).sum())

    @torch.no_grad()
    def outputs(self, gone: Gone) -> list[torch.Tensor]:
        """Of each piece of the samples, with blocks there or not: no gate is in between."""
        self.seen()
        self.passes += 1
        masked, gates = self.masked, self.masked.gates
        masked.gates = {name: torch.full_like(gate, name not in gone) for name, gate in gates.items()}
        try:
            parts = [slice(first, first + self.piece) for first in range(0, len(self.x), self.piece)]
            given = ((self.x[part], self.timesteps[part], some_of(self.condition, part)) for part in parts)
            return [masked.forward(masked.passing(), *one) for one in given]
        finally:
            masked.gates = gates
