"""When the budget tightens: the plan of a pruning run."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Iterations of scoring, mask flow and refit.

    Each iteration scores and tightens the budget; the `closing` ones after them keep the selection and let
    every mask arrive at 0 or 1.

    Args:
        scorings: at least one.
        bound: of the move of a mask in one iteration, above 0 and at most 1.
    """

    scorings: int
    bound: float

    @property
    def closing(self) -> int:
        """Iterations without selection: enough for an entry to travel the rest of the way from 1 to 0."""
        return math.ceil(1 / self.bound - 1e-9) - 1

    @property
    def iterations(self) -> int:
        return self.scorings + self.closing

    def share(self, iteration: int) -> float:
        """Share of the sparsity that is asked for after an iteration, 1 to `iterations`.

        Cubic, gentle at the end (arXiv 1710.01878).
        """
        share = min(1.0, iteration / self.scorings)
        return float(1 - (1 - share) ** 3)

    def selects(self, iteration: int) -> bool:
        """Whether an iteration scores the units anew and selects; else it only moves the masks on."""
        return iteration <= self.scorings
