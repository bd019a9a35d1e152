"""Which noise levels a training run looks at most often: those where its loss is large.

Where most of the loss comes from few levels, a batch spread evenly over the schedule says little of it, and
its gradient is noise. So levels are drawn with a density that follows the root of the mean square of their
losses (importance sampling, Nichol and Dhariwal, arXiv 2102.09672, eq. 18), and every loss is divided by the
density of its level: the loss that is minimised stays the same, its gradient varies less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

RANGES = 20  # equal parts of the schedule, each of one density
EVEN = 0.3  # share of the draws that goes evenly over the schedule, so that no level is forgotten
MEMORY = 9.0  # draws of a range that its mean square remembers beside new ones


@dataclass
class LevelDensity:
    """Density of noise levels, learnt from the losses of the draws so far.

    Args:
        steps: length of the noise schedule.
        squares: [RANGES] running mean of the squared loss of each range.
        counts: [RANGES] draws behind it, up to `MEMORY`.
    """

    steps: int
    squares: list[float] = field(default_factory=lambda: [0.0] * RANGES)
    counts: list[float] = field(default_factory=lambda: [0.0] * RANGES)

    def heights(self) -> list[float]:
        """[RANGES] density of each range, 1 for an even one."""
        known = [square**0.5 for square, count in zip(self.squares, self.counts, strict=True) if count]
        mean = sum(known) / max(1, len(known))
        if not mean:
            return [1.0] * RANGES
        roots = [
            square**0.5 if count else mean for square, count in zip(self.squares, self.counts, strict=True)
        ]
        return [EVEN + (1 - EVEN) * RANGES * root / sum(roots) for root in roots]

    def sums(self) -> list[float]:
        """[RANGES + 1] probability of all that lies before each range."""
        heights = self.heights()
        return [0.0, *(total / RANGES for total in accumulate(heights))]

    def place(self, share: float) -> float:
        """Where a share of all draws, in [0, 1), has its place in the schedule, in [0, 1)."""
        sums = self.sums()
        chosen = max(number for number in range(RANGES) if sums[number] <= share)
        within = (share - sums[chosen]) / (sums[chosen + 1] - sums[chosen])
        return (chosen + min(within, 1.0)) / RANGES

    def weights(self, index: Sequence[int]) -> torch.Tensor:
        """[N] 1 over the density of each level, as positions in the schedule."""
        sums = self.sums()

        def before(position: float) -> float:
            number = min(RANGES - 1, int(position * RANGES))
            return sums[number] + (position * RANGES - number) * (sums[number + 1] - sums[number])

        shares = [before((at + 1) / self.steps) - before(at / self.steps) for at in index]
        return 1 / (self.steps * torch.tensor(shares, dtype=torch.float32))

    def ranges(self, index: torch.Tensor) -> torch.Tensor:
        """[N] the range of each level."""
        return ((index + 0.5) / self.steps * RANGES).long().clamp_max(RANGES - 1)

    def seen(self, index: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """[2 * RANGES] sums of the squares of losses [N] and numbers of draws, by range."""
        found = losses.new_zeros(2, RANGES)
        where = self.ranges(index)
        found[0].index_add_(0, where, losses.square())
        found[1].index_add_(0, where, torch.ones_like(losses))
        return found.flatten()

    def learn(self, seen: Sequence[float]) -> None:
        """Take in what `seen` found, summed over a batch."""
        for number, (total, count) in enumerate(zip(seen[:RANGES], seen[RANGES:], strict=True)):
            before = self.counts[number]
            if count:
                self.squares[number] = (before * self.squares[number] + total) / (before + count)
                self.counts[number] = min(MEMORY, before + count)
