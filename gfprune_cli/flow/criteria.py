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
from gfprune_cli.flow.energy import Loss, Way, choose_way, gradient, hessian_gradient_product
from gfprune_cli.flow.mask import MaskedModel, Masks
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
        fused: take first derivatives by the fused kernels of attention.
        gradients: filled with the cost of the scoring, counted in gradients.
    """

    masked: MaskedModel
    losses: Sequence[Loss]
    seed: int
    way: Way | None = None
    fused: bool = False
    gradients: float = field(default=0.0)

    def energy_flow(self) -> dict[str, torch.Tensor]:
        """theta * (H g) for every parameter, at the masked network: its sum over a unit is -dE/dm.

        The statistics of the norms are held fixed: their own dependence on the masks is left out.
        """
        weights = {name: tensor.detach() for name, tensor in self.masked.effective().items()}
        _, first = gradient(self.losses, weights, fused=self.fused)
        if self.way is None:
            self.way = choose_way(self.losses, weights, first, fused=self.fused)
        product = hessian_gradient_product(self.losses, weights, first, self.way, fused=self.fused)
        self.gradients += 3 if self.way == "finite-difference" else 4.5
        return {name: self.masked.weights[name].detach() * tensor for name, tensor in product.items()}

    def first_order(self, losses: Sequence[Loss]) -> dict[str, torch.Tensor]:
        """theta * g for every parameter, at the masked network."""
        weights = {name: tensor.detach() for name, tensor in self.masked.effective().items()}
        _, first = gradient(losses, weights, fused=self.fused)
        self.gradients += len(losses) / len(self.losses)
        return {name: self.masked.weights[name].detach() * tensor for name, tensor in first.items()}


def gradient_flow(evidence: Evidence) -> Masks:
    """theta . (H g), signed (arXiv 2501.09464): first go the units that raise ||grad L||^2 most."""
    return evidence.masked.unit_sums(evidence.energy_flow())


def gradient_flow_abs(evidence: Evidence) -> Masks:
    """|theta . (H g)|: first go the units whose removal changes ||grad L||^2 the least."""
    return {name: score.abs() for name, score in gradient_flow(evidence).items()}


def taylor(evidence: Evidence) -> Masks:
    """Sum of |theta * g| (arXiv 1906.10771): first-order change of the loss, parameter by parameter."""
    values = evidence.first_order(evidence.losses)
    return evidence.masked.unit_sums({name: value.abs() for name, value in values.items()})


def fisher(evidence: Evidence) -> Masks:
    """Mean square of the first-order change over chunks of the draws: empirical Fisher (arXiv 1906.10771)."""
    squares: Masks = {}
    for loss in evidence.losses:
        sums = evidence.masked.unit_sums(evidence.first_order([loss]))
        squares = {name: squares.get(name, 0) + value.square() for name, value in sums.items()}
    return squares


def diff_pruning(evidence: Evidence) -> Masks:
    """Taylor over low-noise timesteps, while their loss exceeds 0.05 of the largest (arXiv 2305.10924)."""
    weights = {name: tensor.detach() for name, tensor in evidence.masked.effective().items()}
    used, largest = 0, 0.0
    with torch.no_grad():
        for loss in evidence.losses:
            value = loss(weights).item()
            largest = max(largest, value)
            if value < TIMESTEP_THRESHOLD * largest:
                break
            used += 1
    evidence.gradients += 1 / 3  # the forward passes that find the threshold
    values = evidence.first_order(evidence.losses[:used])
    return evidence.masked.unit_sums({name: value.abs() for name, value in values.items()})


def magnitude(evidence: Evidence) -> Masks:
    """Euclidean norm of what produces the unit."""
    squares = {name: weight.detach().square() for name, weight in evidence.masked.weights.items()}
    norms = {name: score.sqrt() for name, score in evidence.masked.unit_sums(squares).items()}
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
        copies: of the weights that are in memory at once: weights, masked weights, gradients, products.
    """

    score: Callable[[Evidence], Masks]
    copies: int


CRITERIA: dict[str, Criterion] = {
    "gradient-flow": Criterion(gradient_flow, 6),
    "gradient-flow-abs": Criterion(gradient_flow_abs, 6),
    "taylor": Criterion(taylor, 4),
    "fisher": Criterion(fisher, 4),
    "diff-pruning": Criterion(diff_pruning, 4),
    "magnitude": Criterion(magnitude, 3),
    "random": Criterion(random, 2),
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
