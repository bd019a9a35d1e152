"""What removal changes: mask-aware group norms beside plain ones, on the demo.

    python benchmarks/removal_gap.py --sparsity 0.5

Masks half of the demo's parameters at once (Taylor scores, weights as they are) and prints the denoising loss
of the masked network with either kind of norm, and of the network after removal.
"""

import argparse

import torch

from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.flow.masked_norms import MaskedGroupNorm
from gfprune_cli.progress import silent
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.plan import make_plan
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import select
from gfprune_cli.structure.removal import remove


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    sparsity = parser.parse_args().sparsity
    recipe = PruneRecipe(model="demo", sparsity=sparsity, budget="params", refit=False, recover=0)
    source = resolve("demo")
    plan = make_plan(source, recipe, silent)
    run = PruneJob(recipe, source, plan, torch.device("cpu"), silent)
    masked, draws, scores = run.scored()
    widths = allocate(plan.cost, scores, recipe.sparsity, budget=recipe.budget).kept
    kept = {group.name: select(group, scores[group.name], widths[group.name]) for group in plan.groups}
    masked.set_masks({name: support.double() for name, support in kept.items()})
    aware = run.loss(draws, masked)
    for module in masked.model.modules():  # as every other soft pruner does
        if isinstance(module, MaskedGroupNorm):
            module.set_mask(torch.ones(len(module.membership)))
    plain = run.loss(draws, masked)
    removed = run.loss(draws, remove(run.load(), plan.groups, kept))
    print("| norms while masked | masked loss | removed loss | gap |")
    print("|---|---|---|---|")
    for name, loss in (("mask-aware", aware), ("plain", plain)):
        print(f"| {name} | {loss:.5f} | {removed:.5f} | {abs(removed - loss) / loss:.1e} |")


if __name__ == "__main__":
    main()
