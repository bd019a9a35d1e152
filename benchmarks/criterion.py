"""What makes a criterion work on a trained network? Its variants, removed in one shot and measured at once.

    python benchmarks/criterion.py
    python benchmarks/criterion.py --studies groups "groups, MACs" --out docs/benchmarks/groups.md

Scores the demo on its training images, masks what each variant says is worth least, and takes the denoising
loss on the held-out images: nothing is trained, so nothing but the choice of units counts. Masked and removed
networks compute the same, so nothing needs to be removed either. The second form is about the comparison of
groups. Writes a page to docs/benchmarks/.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from provenance import PAGES, write_page
from yardstick import SEED, Subject, demo, pictures_of

from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.data.draws import Draws
from gfprune_cli.data.measure import denoising_loss
from gfprune_cli.flow.criteria import FUNCTIONS, Evidence, relative, score
from gfprune_cli.flow.energy import Loss, Weights, gradient, hessian_gradient_product
from gfprune_cli.flow.loop import scoring_losses
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.flow.sensitivity import DRAWS, SHARE, comparable, measured_rises
from gfprune_cli.progress import silent
from gfprune_cli.pruning.plan import Plan, make_plan
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import Budget
from gfprune_cli.structure.groups import select

CHUNK = 16
MEASURED = 256  # draws behind each loss
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

    def mask(self, scores: Masks, sparsity: float, budget: Budget = "params") -> None:
        kept = allocate(self.plan.cost, scores, sparsity, budget=budget, align=ALIGN, strict=False).kept
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

    def after(self, scores: Masks, sparsity: float, budget: Budget = "params") -> float:
        """The loss once the units of the lowest scores are gone."""
        self.mask(scores, sparsity, budget)
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


def of_timesteps(bench: Bench, count: int) -> dict[str, Masks]:
    """Criteria over parts of the noise schedule."""
    losses = bench.losses(count)
    values = torch.tensor([value_of(bench, loss) for loss in losses]).clamp_min(1e-6)
    parts = {
        "all timesteps": losses,
        "the lower half of the noise": losses[: len(losses) // 2],
        "the upper half of the noise": losses[len(losses) // 2 :],
        "each chunk divided by its loss": weighted(losses, 1 / values),
        "each chunk divided by the root of its loss": weighted(losses, values.rsqrt()),
    }
    found = {}
    for name, chosen in parts.items():
        evidence = Evidence(bench.masked, chosen, bench.draws.seed, "finite-difference")
        found[f"first order, {name}"] = score("taylor", evidence)
        found[f"flow, absolute, {name}"] = score("gradient-flow-abs", evidence)
    return found


def of_variants(bench: Bench, count: int) -> dict[str, Masks]:
    evidence = Evidence(bench.masked, [], bench.draws.seed)
    return variants(bench, tensors_of(bench, bench.losses(count))) | {
        name: score(name, evidence) for name in ("magnitude", "random")
    }


def of_draws(bench: Bench, count: int) -> dict[str, Masks]:
    """Criteria over a quarter of the draws, over all, and over four and sixteen times as many."""
    found = {}
    for draws in (count // 4, count, 4 * count, 16 * count):
        evidence = Evidence(bench.masked, bench.losses(draws), bench.draws.seed, "finite-difference")
        found[f"first order, {draws} draws"] = score("taylor", evidence)
        found[f"flow, signed, {draws} draws"] = signed = score("gradient-flow", evidence)
        found[f"flow, absolute, {draws} draws"] = absolute(signed)
    return found


def in_stages(bench: Bench, sparsity: float, count: int) -> dict[str, float]:
    """Loss after scoring anew at the masked network, as the budget tightens in stages without training."""
    found = {}
    criteria = {
        "first order": "taylor",
        "flow, absolute": "gradient-flow-abs",
        "flow, signed": "gradient-flow",
    }
    for label, criterion in criteria.items():
        for number in (1, 4):
            for stage in range(1, number + 1):
                losses = bench.losses(count, stage)
                evidence = Evidence(bench.masked, losses, bench.draws.seed, "finite-difference")
                bench.mask(score(criterion, evidence), sparsity * stage / number)
            found[f"{label}, scored {number} times"] = bench.loss()
            bench.unmask()
    return found


def of_groups(bench: Bench, count: int) -> dict[str, Masks]:
    """Every criterion with its own scores, and with groups compared by measured losses."""
    probes = bench.losses(DRAWS, 0)

    @torch.no_grad()
    def loss() -> float:
        weights = bench.masked.effective()
        return statistics.mean(float(part(weights)) for part in probes)

    found = {}
    for name in FUNCTIONS:
        evidence = Evidence(bench.masked, bench.losses(count), bench.draws.seed, "finite-difference")
        found[f"{name}, by scores"] = scores = score(name, evidence)
        rises = measured_rises(bench.masked, scores, SHARE, loss, silent)
        found[f"{name}, measured"] = comparable(bench.plan.groups, scores, rises)
    return found


GROUPS = ("groups", "groups, MACs")  # on a page of their own
STUDIES = ("variants", "draws", "timesteps", "stages")
SCORINGS: dict[str, Callable[[Bench, int], dict[str, Masks]]] = {
    "variants": of_variants,
    "groups": of_groups,
    "groups, MACs": of_groups,
    "draws": of_draws,
    "timesteps": of_timesteps,
}


def study(name: str, bench: Bench, sparsities: Sequence[float], draws: int) -> dict[str, list[float]]:
    """Variant -> loss after removal at every sparsity."""
    if name == "stages":
        columns = [in_stages(bench, sparsity, draws) for sparsity in sparsities]
        return {row: [column[row] for column in columns] for row in columns[0]}
    rows = SCORINGS[name](bench, draws)
    budget: Budget = "macs" if name.endswith("MACs") else "params"
    return {
        row: [bench.after(scores, sparsity, budget) for sparsity in sparsities]
        for row, scores in rows.items()
    }


def table(name: str, options: argparse.Namespace) -> list[str]:
    """Loss after removal, mean and range over seeds, at every sparsity."""
    runs = [
        study(name, Bench.open(demo(), seed), options.sparsity, options.draws)
        for seed in range(options.seeds)
    ]
    heads = " | ".join(f"at {sparsity:g} | range" for sparsity in options.sparsity)
    lines = [f"| {name} | {heads} |", f"|---|{'---|' * 2 * len(options.sparsity)}"]
    for row in runs[0]:
        cells = []
        for values in zip(*(run[row] for run in runs), strict=True):
            cells.append(f"{statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.44, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=64, help="per scoring")
    parser.add_argument("--studies", nargs="+", default=STUDIES, choices=(*STUDIES, *GROUPS))
    parser.add_argument("--out", type=Path, default=PAGES / "criterion.md")
    options = parser.parse_args()
    dense = Bench.open(demo(), 0).loss()
    body = [
        f"Denoising loss of the demo on held-out images right after removal ({MEASURED} draws), with nothing",
        f"trained; {options.draws} draws per scoring, means over {options.seeds} seeds. Dense: {dense:.4f}.",
        "Sparsity is of parameters, and groups are compared by their scores, unless a row says otherwise.",
    ]
    for name in options.studies:
        body += ["", f"## {name}", "", *table(name, options)]
        print(f"{name} done", flush=True)
    command = shlex.join(["python", "benchmarks/criterion.py", *sys.argv[1:]])
    about_groups = set(options.studies) <= set(GROUPS)
    title = "What groups are compared by" if about_groups else "What makes a criterion work"
    print(write_page(options.out, title, command, 0, "\n".join(body)))


if __name__ == "__main__":
    main()
