"""When the budget tightens: the plan of a pruning run."""

import math

from pydantic import BaseModel, ConfigDict, Field


class Schedule(BaseModel):
    """Iterations of scoring, mask flow and training.

    The budget tightens over the first iterations; the last `closing` ones keep the selection and let every
    mask arrive at 0 or 1.
    """

    model_config = ConfigDict(frozen=True)

    sparsity: float = Field(gt=0, lt=1)
    iterations: int = Field(ge=1)
    steps_per_iteration: int = Field(ge=0)
    bound: float = Field(gt=0, le=1)
    score_every: int = Field(ge=1)

    @property
    def closing(self) -> int:
        """Iterations without selection: enough for an entry to travel from 1 to 0."""
        return min(self.iterations - 1, math.ceil(1 / self.bound))

    @property
    def pace(self) -> float:
        """How far an entry may move in one iteration: `bound`, or what a short run needs to close."""
        return max(self.bound, 1 / max(1, self.closing))

    @property
    def selecting(self) -> int:
        return self.iterations - self.closing

    def target(self, iteration: int) -> float:
        """Sparsity after an iteration, 1 to `iterations`: cubic, gentle at the end (arXiv 1710.01878)."""
        share = min(1.0, iteration / self.selecting)
        return float(self.sparsity * (1 - (1 - share) ** 3))

    def selects(self, iteration: int) -> bool:
        return iteration <= self.selecting

    def scores(self, iteration: int) -> bool:
        """Whether an iteration scores the units anew; otherwise it selects with the scores it has."""
        return self.selects(iteration) and (iteration - 1) % self.score_every == 0

    @property
    def training_steps(self) -> int:
        return self.iterations * self.steps_per_iteration
