"""How many channels each group keeps: the widths that meet a budget of parameters, MACs, or both.

`adaptive` gives every group its own width, by score per saved share of what the budget counts.
`native` keeps to widths that the stock diffusers class can express (see `structure.native`).
"""

import math
from collections.abc import Mapping

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.structure.cost import CostModel, counted
from gfprune_cli.structure.search import TOLERANCE, Allocation, Search

FLOORS = (0.5, 0.25, 0.0)  # of the uniform width ratio: no group is starved while another is untouched
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
) -> Allocation:
    """Spend the budget where the least score is lost per saved parameter and MAC.

    Greedy with exact costs: after each step the savings of every group are those of the network that is
    left. At most 1 - sparsity of everything that the budget counts stays. Where it counts parameters and
    MACs, how much a share of one is worth beside a share of the other is found by bisection, so that both
    run out together.

    Args:
        scores: group name -> [units].
        strict: False for a budget on the way, where the nearest reachable serves.
        start: channels by group of the network that narrows further; None for the dense one.

    Raises:
        UsageError: the budget cannot be reached; names the nearest reachable sparsity.
    """
    found, nearest = attempt(cost, scores, sparsity, budget, align, start, strict=strict)
    for _ in range(ADVICES):
        if found is not None:
            break
        advised = rounded_down(nearest.sparsity)  # what an error names has to be accepted
        accepted, other = attempt(cost, scores, advised, budget, align, start, strict=True)
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
    budget: str,
    align: int,
    start: Mapping[str, int] | None,
    *,
    strict: bool,
) -> tuple[Allocation | None, Allocation]:
    """(widths that meet a budget, None if there are none; the nearest to it)."""
    best: Allocation | None = None
    while True:
        for floor in FLOORS:
            depth = floor * math.sqrt(1 - sparsity)
            search = Search(cost, scores, 1 - sparsity, counted(budget), align, depth, start)
            found = search.cheapest(strict=strict)
            if not strict or 0 <= found.sparsity - sparsity <= TOLERANCE or spared(cost, found, sparsity):
                return found, found
            if best is None or abs(found.sparsity - sparsity) < abs(best.sparsity - sparsity):
                best = found
        assert best is not None
        if align == 1:
            return None, best
        align //= 2


def spared(cost: CostModel, found: Allocation, sparsity: float) -> bool:
    """Whether what was saved before is enough, and every channel stays."""
    return found.sparsity >= sparsity and not any(cost.removed(found.kept).values())


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
