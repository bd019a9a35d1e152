"""Which units matter: one score per unit, the higher the more important.

Each criterion is one short function over `Evidence`. Scores of the loss-based criteria share one unit
(loss, or squared gradient norm) and can be compared across groups as they are; magnitude and random ones
mean nothing across layers and are divided by their group's mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.finite import NotFinite
from gfprune_cli.flow.energy import (
    Loss,
    Sum,
    Way,
    choose_way,
    exact_product,
    gradient,
    take_differences,
    take_gradient,
)
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.flow.unit_sums import UnitSums, shares, unit_sums
from gfprune_cli.runtime.processes import ALONE, Processes
from gfprune_cli.structure.blocks import inside
from gfprune_cli.structure.groups import ChannelGroup

TIMESTEP_THRESHOLD = 0.05  # of the largest loss: Diff-Pruning leaves later timesteps out


@dataclass
class Evidence:
    """What a criterion may look at.

    Args:
        masked: the network at its current masks.
        losses: the denoising loss, one function per chunk of the draws, in ascending order of noise.
        seed: of the run.
        way: how Hessian-gradient products are taken; chosen by measurement where None.
        turns: in which a gradient that has to be summed over all draws is taken, a share of it at a time.
        processes: that share the draws: the losses are those of this one's.
        gradients: filled with the cost of the scoring, counted in gradients.
    """

    masked: MaskedModel
    losses: Sequence[Loss]
    seed: int
    way: Way | None = None
    turns: int = 1
    processes: Processes = ALONE
    gradients: float = field(default=0.0)

    def energy_flow(self) -> Masks:
        """The sum of theta * (H g) over each unit, at the masked network: -dE/dm.

        The statistics of the norms are held fixed: their own dependence on the masks is left out.
        """
        weights = self.masked.passing()
        _, own = gradient(self.losses, weights)
        first = {name: self.processes.total(part) for name, part in own.items()}
        if self.way is None:
            self.way = choose_way(self.losses, weights, first, self.processes.total)
        flow = UnitSums(self.masked, self.weighted)
        if self.way == "finite-difference":
            take_differences(self.losses, weights, first, flow.add)
        else:
            for name, part in exact_product(self.losses, weights, first).items():
                flow.add(name, part)
        self.gradients += 3 if self.way == "finite-difference" else 4.5
        return self.processes.totals(flow.total())

    def weighted(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return self.masked.weights[name].detach() * part

    def first_order(self, losses: Sequence[Loss]) -> Masks:
        """The sum of |theta * g| over each unit, at the masked network."""
        sums = UnitSums(self.masked, lambda name, part: self.weighted(name, part).abs())
        for names in shares(sums.names(), self.masked.weights, self.turns):
            first = Sum()
            take_gradient(losses, self.masked.passing(), first.add, names=names)
            for name in names if self.processes.count > 1 else first.parts:
                weight = self.masked.weights[name]
                part = first.parts[name] if name in first.parts else torch.zeros_like(weight)
                sums.add(name, self.processes.total(part))
            self.gradients += len(losses) / len(self.losses)
        return sums.total()


def gradient_flow(evidence: Evidence) -> Masks:
    """theta . (H g), signed (arXiv 2501.09464): first go the units that raise ||grad L||^2 most."""
    return evidence.energy_flow()


def gradient_flow_abs(evidence: Evidence) -> Masks:
    """|theta . (H g)|: first go the units whose removal changes ||grad L||^2 the least."""
    return {name: score.abs() for name, score in gradient_flow(evidence).items()}


def taylor(evidence: Evidence) -> Masks:
    """Sum of |theta * g| (arXiv 1906.10771): first-order change of the loss, parameter by parameter."""
    return evidence.first_order(evidence.losses)


def fisher(evidence: Evidence) -> Masks:
    """Mean square of the first-order change over chunks of the draws: empirical Fisher (arXiv 1906.10771)."""
    squares: Masks = {}
    for loss in evidence.losses:
        sums = UnitSums(evidence.masked, evidence.weighted)
        take_gradient([loss], evidence.masked.passing(), sums.add, names=sums.names())
        found = evidence.processes.totals(sums.total())
        squares = {name: squares.get(name, 0) + value.square() for name, value in found.items()}
    evidence.gradients += 1
    return squares


def diff_pruning(evidence: Evidence) -> Masks:
    """Taylor over low-noise timesteps, while their loss exceeds 0.05 of the largest (arXiv 2305.10924)."""
    weights = evidence.masked.passing()
    used, largest = 0, 0.0
    with torch.no_grad():
        for loss in evidence.losses:
            value = evidence.processes.total(loss(weights)).item()
            largest = max(largest, value)
            if value < TIMESTEP_THRESHOLD * largest:
                break
            used += 1
    evidence.gradients += 1 / 3  # the forward passes that find the threshold
    return evidence.first_order(evidence.losses[:used])


def magnitude(evidence: Evidence) -> Masks:
    """Euclidean norm of what produces the unit."""
    squares = unit_sums(evidence.masked, evidence.masked.weights, lambda _, weight: weight.detach().square())
    norms = {name: score.sqrt() for name, score in squares.items()}
    return add_blocks(relative(norms, evidence.masked.groups), evidence.masked.groups)


def random(evidence: Evidence) -> Masks:
    """The same seeded uniform numbers at every iteration."""
    scores = {
        group.name: torch.rand(group.units, generator=generator(evidence.seed, "random", group.name)).double()
        for group in evidence.masked.groups
    }
    return add_blocks(scores, evidence.masked.groups)


def add_blocks(scores: Masks, groups: tuple[ChannelGroup, ...]) -> Masks:
    """For criteria without a common unit: a block scores what the channels inside it score together.

    Its own score stands where no channels may go, as in the native layout.
    """
    for block in groups:
        within = [scores[group.name].sum() for group in groups if block.is_block and inside(group, block)]
        if within:
            scores[block.name] = torch.stack(within).sum().view(1)
    return scores


def relative(scores: Masks, groups: tuple[ChannelGroup, ...]) -> Masks:
    """Divide by the mean of each group; of a stack, for blocks."""
    together: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        together.setdefault(group.stack or group.name, []).append(scores[group.name])
    means = {name: torch.cat(values).mean() for name, values in together.items()}
    return {
        group.name: scores[group.name]
        / means[group.stack or group.name].clamp_min(torch.finfo(scores[group.name].dtype).tiny)
        for group in groups
    }


@dataclass(frozen=True)
class Criterion:
    """One way to score.

    Args:
        score: higher is more important.
        copies: of the weights that are in memory at once: weights, and gradients.
        turns: whether the gradients may come a share at a time.
    """

    score: Callable[[Evidence], Masks]
    copies: int
    turns: bool = False


CRITERIA: dict[str, Criterion] = {
    "gradient-flow": Criterion(gradient_flow, 2),
    "gradient-flow-abs": Criterion(gradient_flow_abs, 2),
    "taylor": Criterion(taylor, 2, turns=True),
    "fisher": Criterion(fisher, 1),
    "diff-pruning": Criterion(diff_pruning, 2, turns=True),
    "magnitude": Criterion(magnitude, 1),
    "random": Criterion(random, 1),
}


def score(criterion: str, evidence: Evidence) -> Masks:
    """Scores by group name, [units] float64 on the CPU.

    Raises:
        NotFinite: a score is not finite; names the group.
    """
    scores = CRITERIA[criterion].score(evidence)
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise NotFinite(
                f"the {criterion} scores of channel group {name} are not finite: "
                "use --criterion magnitude, or check the checkpoint and --data"
            )
    return scores
