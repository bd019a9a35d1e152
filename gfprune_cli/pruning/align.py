"""`--align auto`: the integer it stands for, settled before anything else of a run."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from gfprune_cli.checkpoint.state import StateFolder
from gfprune_cli.device import HALF, default_precision
from gfprune_cli.progress import Report, notice
from gfprune_cli.pruning.plan import Plan
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.latency import choose_align


def settle_align(
    recipe: PruneRecipe,
    plan: Plan,
    device: torch.device,
    destination: Path,
    report: Report,
    *,
    resume: bool,
    force: bool,
) -> PruneRecipe:
    """The recipe with an integer alignment, which is what the output records and a repeated run uses.

    A resumed run goes on with the alignment of its state, or of the output that it finished, wherever that
    was measured; an output that `force` replaces may be of another run. Layouts of the stock class have
    widths of their own, and nothing is measured for them.
    """
    if recipe.align != "auto" or recipe.layout == "native":
        return recipe
    align = align_so_far(destination, finished=not force) if resume else None
    if align is None:
        dtype = HALF.get(recipe.precision or default_precision(device), torch.float32)
        align = choose_align(plan.cost, device, dtype, report)
        notice(report, f"--align auto: widths are rounded to multiples of {align} on this device")
    return replace(recipe, align=align)


def align_so_far(destination: Path, *, finished: bool) -> int | None:
    """The alignment of the run that left a state for this destination, or `finished` it; None if unknown."""
    states = [(state / "state.json", "identity") for state in reversed(StateFolder(destination, {}).states())]
    for path, key in [*states, *[(destination / "gfprune.json", "recipe")] * finished]:
        try:
            align = json.loads(path.read_text(encoding="utf-8"))[key]["align"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(align, int) and align >= 1:
            return align
    return None
