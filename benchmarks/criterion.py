"""What makes a criterion work on a trained network? Its variants, removed in one shot and measured at once.

    python benchmarks/criterion.py --seeds 3

Scores the demo on its training images, masks what each variant says is worth least, and takes the denoising loss
on the held-out images: nothing is trained, so nothing but the choice of units counts. Masked and removed networks
compute the same, so nothing needs to be removed either. Prints Markdown tables.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from yardstick import SEED, Subject, demo, pictures_of

from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.data.draws import Draws
from gfprune_cli.data.measure import denoising_loss
from gfprune_cli.flow.criteria import Evidence, relative, score
from gfprune_cli.flow.energy import Loss, Weights, gradient, hessian_gradient_product
from gfprune_cli.flow.loop import scoring_losses
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.progress import silent
from gfprune_cli.pruning.plan import Plan, make_plan
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import select

CHUNK = 16
MEASURED = 1024  # draws behind each loss
ALIGN = 4


@dataclass
class Bench:
    """A dense network behind masks, and the draws it is scored on."""

    subject: Subject
    plan: Plan
    masked: MaskedModel
    draws: Draws

    @classmethod
    def open(cls, subject: Subject, seed: int) -> "Bench":
        recipe = PruneRecipe(model=subject.model, sparsity=0.5)
        plan = make_plan(resolve(subject.model), recipe, silent)
        masked = MaskedModel(load_model(plan.component).requires_grad_(False), plan.groups)
        return cls(subject, plan, masked, Draws(pictures_of(subject), subject.process.steps, seed))

    def losses(self, count: int, step: int = 1) -> list[Loss]:
        return scoring_losses(self.masked, self.subject.process, self.draws, step, count, CHUNK, silent)

    def unmask(self) -> None:
        self.masked.set_masks({name: torch.ones_like(mask) for name, mask in self.masked.masks.items()})

    def mask(self, scores: Masks, sparsity: float) -> None:
        kept = allocate(self.plan.cost, scores, sparsity, align=ALIGN, strict=False).kept
        self.masked.set_masks(
            {
                group.name: select(group, scores[group.name], kept[group.name]).double()
                for group in self.plan.groups
            }
        )

    @torch.no_grad()
    def loss(self) -> float:
        """Denoising loss on the held-out images at the masks of now."""
        held_out = Draws(self.subject.held_out, self.subject.process.steps, SEED)
        effective = {name: tensor.detach() for name, tensor in self.masked.effective().items()}
        network = partial(self.masked.forward, effective)
        return denoising_loss(network, self.subject.process, held_out, MEASURED, silent)

    def after(self, scores: Masks, sparsity: float) -> float:
        """The loss once the units of the lowest scores are gone."""
        self.mask(scores, sparsity)
        found = self.loss()
        self.unmask()
        return found


@dataclass(frozen=True)
class Tensors:
    """What variants are made of, all at the dense network: theta, g, H g, and the gradient of every chunk."""

    weights: Weights
    gradient: Weights
    product: Weights
    chunks: list[Weights]


def tensors_of(bench: Bench, losses: list[Loss]) -> Tensors:
    weights = {name: tensor.detach() for name, tensor in bench.masked.effective().items()}
    chunks = [gradient([loss], weights)[1] for loss in losses]
    mean = {name: torch.stack([chunk[name] for chunk in chunks]).mean(0) for name in weights}
    return Tensors(
        weights, mean, hessian_gradient_product(losses, weights, mean, "finite-difference"), chunks
    )


def times(first: Weights, second: Weights) -> Weights:
    return {name: first[name] * second[name] for name in first}


def absolute(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.abs() for name, value in values.items()}


def scaled(scores: Masks) -> Masks:
    """Divided by the mean of their absolute values over all units."""
    mean = torch.cat([value.abs() for value in scores.values()]).mean()
    return {name: value / mean for name, value in scores.items()}


def mixed(first: Masks, second: Masks, share: float) -> Masks:
    one, other = scaled(first), scaled(second)
    return {name: one[name] + share * other[name] for name in one}


def variants(bench: Bench, found: Tensors) -> dict[str, Masks]:
    """Variant -> scores by group."""
    sums, groups = bench.masked.unit_sums, bench.plan.groups
    first, flow = times(found.weights, found.gradient), times(found.weights, found.product)
    taylor, signed = sums(absolute(first)), sums(flow)
    sizes = sums({name: torch.ones_like(value) for name, value in found.weights.items()})
    each = [sums(times(found.weights, chunk)) for chunk in found.chunks]
    fisher = {name: torch.stack([chunk[name].square() for chunk in each]).mean(0) for name in each[0]}
    unit_flow = absolute(signed)
    return {
        "first order: sum of |theta g| (taylor)": taylor,
        "first order: |sum of theta g|": absolute(sums(first)),
        "first order, each group over its mean": relative(taylor, groups),
        "first order, per parameter": {name: taylor[name] / sizes[name] for name in taylor},
        "flow, signed (gradient-flow)": signed,
        "flow, signed, reversed": {name: -value for name, value in signed.items()},
        "flow, |sum of theta Hg| (gradient-flow-abs)": unit_flow,
        "flow, sum of |theta Hg|": sums(absolute(flow)),
        "flow, absolute, each group over its mean": relative(unit_flow, groups),
        "flow, absolute, per parameter": {name: unit_flow[name] / sizes[name] for name in unit_flow},
        "first order + 0.1 flow": mixed(taylor, signed, 0.1),
        "first order - 0.1 flow": mixed(taylor, signed, -0.1),
        "first order + |flow|": mixed(taylor, unit_flow, 1),
        "sqrt(first order x |flow|)": {name: (taylor[name] * unit_flow[name]).sqrt() for name in taylor},
        "Fisher: mean of (sum of theta g)^2 over chunks": fisher,
        "sqrt(Fisher)": {name: value.sqrt() for name, value in fisher.items()},
    }


def low_noise(losses: list[Loss], share: float) -> list[Loss]:
    """The chunks of least noise."""
    return losses[: max(1, round(share * len(losses)))]


def high_noise(losses: list[Loss], share: float) -> list[Loss]:
    return losses[-max(1, round(share * len(losses))) :]


def weighted(losses: list[Loss], weights: torch.Tensor) -> list[Loss]:
    """Every chunk times its weight; the weights have mean 1."""
    return [
        partial(times_weight, loss, float(w))
        for loss, w in zip(losses, weights / weights.mean(), strict=True)
    ]


def times_weight(loss: Loss, weight: float, values: Weights) -> torch.Tensor:
    return loss(values) * weight


@torch.no_grad()
def value_of(bench: Bench, loss: Loss) -> float:
    return float(loss(bench.masked.effective()))


def timesteps(bench: Bench, sparsity: float, count: int) -> dict[str, float]:
    """Criterion at parts of the noise schedule -> loss after removal."""
    losses = bench.losses(count)
    values = torch.tensor([value_of(bench, loss) for loss in losses]).clamp_min(1e-6)
    parts = {
        "all timesteps": losses,
        "the lower half of the noise": low_noise(losses, 0.5),
        "the upper half of the noise": high_noise(losses, 0.5),
        "each chunk divided by its loss": weighted(losses, 1 / values),
        "each chunk divided by the root of its loss": weighted(losses, values.rsqrt()),
    }
    found = {}
    for name, chosen in parts.items():
        for label, criterion in (("taylor", "taylor"), ("flow, absolute", "gradient-flow-abs")):
            scores = score(criterion, Evidence(bench.masked, chosen, bench.draws.seed, "finite-difference"))
            found[f"{label}, {name}"] = bench.after(scores, sparsity)
    return found


def stages(bench: Bench, sparsity: float, count: int) -> dict[str, float]:
    """Criterion taken anew at the masked network as the budget tightens in K equal stages, without training."""
    found = {}
    for label, criterion in (
        ("taylor", "taylor"),
        ("flow, absolute", "gradient-flow-abs"),
        ("flow, signed", "gradient-flow"),
    ):
        for number in (1, 2, 4, 8):
            for stage in range(1, number + 1):
                evidence = Evidence(
                    bench.masked, bench.losses(count, stage), bench.draws.seed, "finite-difference"
                )
                bench.mask(score(criterion, evidence), sparsity * stage / number)
            found[f"{label}, scored {number} times"] = bench.loss()
            bench.unmask()
    return found


def by_variant(bench: Bench, sparsity: float, count: int) -> dict[str, float]:
    found = tensors_of(bench, bench.losses(count))
    rows = variants(bench, found)
    evidence = Evidence(bench.masked, [], bench.draws.seed)
    rows |= {name: score(name, evidence) for name in ("magnitude", "random")}
    return {name: bench.after(scores, sparsity) for name, scores in rows.items()}


def by_draws(bench: Bench, sparsity: float, count: int) -> dict[str, float]:
    found = {}
    for draws in (16, 64, 256, 1024):
        for label, criterion in (
            ("taylor", "taylor"),
            ("flow, absolute", "gradient-flow-abs"),
            ("flow, signed", "gradient-flow"),
        ):
            evidence = Evidence(bench.masked, bench.losses(draws), bench.draws.seed, "finite-difference")
            found[f"{label}, {draws} draws"] = bench.after(score(criterion, evidence), sparsity)
    return found


STUDIES: dict[str, Callable[[Bench, float, int], dict[str, float]]] = {
    "variants": by_variant,
    "draws": by_draws,
    "timesteps": timesteps,
    "stages": stages,
}


def table(study: str, options: argparse.Namespace) -> None:
    """Loss after removal, mean and range over seeds, at every sparsity."""
    found: dict[str, dict[float, list[float]]] = {}
    for seed in range(options.seeds):
        bench = Bench.open(demo(), seed)
        for sparsity in options.sparsity:
            for name, value in STUDIES[study](bench, sparsity, options.draws).items():
                found.setdefault(name, {}).setdefault(sparsity, []).append(value)
    heads = " | ".join(f"at {sparsity:g} | seeds" for sparsity in options.sparsity)
    print(f"\n### {study}\n\n| {study} | {heads} |\n|---|{'---|' * 2 * len(options.sparsity)}")
    for name, columns in found.items():
        cells = [
            f"{statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f}"
            for values in columns.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.44, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=256, help="per scoring")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    options = parser.parse_args()
    bench = Bench.open(demo(), 0)
    print(f"Dense: {bench.loss():.4f}. {MEASURED} draws of the held-out images, {options.draws} per scoring.")
    for study in options.studies:
        table(study, options)


if __name__ == "__main__":
    main()
