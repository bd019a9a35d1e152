"""How many channels each group keeps: the widths that meet a budget of parameters, MACs and time.

`adaptive` gives every group its own width, by score per saved share of what the budget counts.
`native` keeps to widths that the stock diffusers class can express (see `structure.native`).
"""

import math
from collections.abc import Mapping
from functools import partial

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.structure.cost import TIME, CostModel, counted
from gfprune_cli.structure.search import TOLERANCE, Allocation, Search
from gfprune_cli.structure.times import BLOCKS

# of the uniform width ratio: no group is starved while another is untouched
FLOORS = (0.8, 0.7, 0.5, 0.25, 0.0)
SLACK = 1e-9  # of rounding
PADDED = 0.2  # from which on widths in whole blocks are worth a try
ADVICES = 5  # tries to name a sparsity that can be reached


def allocate(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    budget: str = "both",
    align: int = 1,
    strict: bool = True,
    start: Mapping[str, int] | None = None,
    before: Mapping[str, str] | None = None,
    time: float = 0.0,
) -> Allocation:
    """Spend the budget where the least score is lost per saved parameter and MAC.

    Greedy with exact costs: after each step the savings of every group are those of the network that is
    left. At most 1 - sparsity of everything that the budget counts stays. Where it counts parameters and
    MACs, how much a share of one is worth beside a share of the other is found by bisection, so that both
    run out together.

    Args:
        scores: group name -> [units].
        sparsity: share of what the budget counts that goes; 0 where only time counts.
        strict: False for a budget on the way, where the nearest reachable serves.
        start: channels by group of the network that narrows further; None for the dense one.
        before: block -> the one that has to be gone before it goes.
        time: share of the time that goes, too.

    Raises:
        OutOfTime: the budget of time cannot be reached; UsageError: that of parameters and MACs cannot, names
            the nearest reachable sparsity.
    """
    if time:
        return timed(cost, scores, sparsity, time, budget, align, start, before, strict=strict)
    keys = counted(budget)
    tried = partial(attempt, cost, scores, align=align, start=start, before=before)
    found, nearest = tried(dict.fromkeys(keys, sparsity), strict=strict)
    if found is not None:
        return found
    for _ in range(ADVICES):
        advised = rounded_down(nearest.sparsity)  # what an error names has to be accepted
        accepted, other = tried(dict.fromkeys(keys, advised), strict=True)
        if accepted is not None:
            break
        nearest = other
    raise UsageError(unreachable(sparsity, budget, nearest))


def timed(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    time: float,
    budget: str,
    align: int,
    start: Mapping[str, int] | None,
    before: Mapping[str, str] | None,
    *,
    strict: bool,
) -> Allocation:
    """`allocate` for a budget of time, and of what the sparsity counts unless it is 0.

    Where both are asked for and one alone takes all of the other, what binds is met closely, the other more
    than met. Widths in whole blocks of channels are tried, too: where kernels fill up the rest, the same time
    leaves more channels.
    """
    asked = {**(dict.fromkeys(counted(budget), sparsity) if sparsity else {}), TIME: time}
    assert cost.times is not None
    filled = strict and cost.times.paddings.max() > PADDED
    blocks = [block for block in reversed(BLOCKS) if filled and block > align and block % align == 0]
    tried = partial(attempt, cost, scores, asked, start=start, before=before, strict=strict)
    tries = [tried(align=one) for one in (*blocks, align)]
    met = [found or nearest for found, nearest in tries if excess(nearest, asked) >= -SLACK or not strict]
    if not met:
        nearest = max((nearest for _, nearest in tries), key=lambda one: excess(one, asked))
        raise OutOfTime(nearest, unreachable(sparsity, budget, nearest))
    search = Search(cost, scores, {TIME: 0.0}, start=start)
    return min(met, key=lambda one: search.lost(one.kept))


class OutOfTime(UsageError):
    """A network that cannot be made as fast as was asked; with the fastest that was found."""

    def __init__(self, nearest: Allocation, message: str) -> None:
        super().__init__(message)
        self.nearest = nearest


def excess(found: Allocation, asked: Mapping[str, float]) -> float:
    """By how much more than was asked goes, of the cost that binds."""
    return min(found.sparsities[key] - share for key, share in asked.items())


def farness(distance: float, asked: Mapping[str, float]) -> tuple[bool, float]:
    """How far widths are from a budget; of time, which steps may meet coarsely, more is nearer than less."""
    return TIME in asked and distance < 0, abs(distance)


def attempt(
    cost: CostModel,
    scores: Mapping[str, torch.Tensor],
    asked: Mapping[str, float],
    *,
    align: int,
    start: Mapping[str, int] | None,
    before: Mapping[str, str] | None,
    strict: bool,
) -> tuple[Allocation | None, Allocation]:
    """(widths that meet a budget, None if there are none; the nearest to it).

    Args:
        asked: cost -> share of it that goes.
    """
    best: Allocation | None = None
    left = {key: 1 - share for key, share in asked.items()}
    while True:
        for floor in FLOORS:
            depth = floor * math.sqrt(min(left.values()))
            search = Search(cost, scores, left, align, depth, start, before)
            found = search.cheapest(strict=strict)
            distance = excess(found, asked)
            # what was saved before may be enough, so that every channel stays
            spared = distance >= 0 and not any(cost.removed(found.kept).values())
            if not strict or 0 <= distance <= TOLERANCE or spared:
                return found, found
            if best is None or farness(distance, asked) < farness(excess(best, asked), asked):
                best = found
        assert best is not None
        if align == 1:
            return None, best
        align //= 2


def rounded_down(sparsity: float) -> float:
    """To the three digits that a message shows."""
    return math.floor(sparsity * 1000) / 1000


def unreachable(sparsity: float, budget: str, nearest: Allocation) -> str:
    """What to say of a budget that no widths meet."""
    shares = ", ".join(f"{share:.3f} of {key}" for key, share in nearest.sparsities.items())
    several = f" (which removes {shares})" if len(nearest.sparsities) > 1 else ""
    return (
        f"--sparsity {sparsity:g} of {budget} cannot be reached: the nearest is "
        f"{rounded_down(nearest.sparsity):.3f}{several}. Ask for that, or use another --budget"
    )
