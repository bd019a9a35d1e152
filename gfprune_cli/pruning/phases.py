"""The phases of a prune run and the memory that each takes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gfprune_cli.diffusion.loss import CHUNK
from gfprune_cli.flow.criteria import CRITERIA
from gfprune_cli.flow.loop import COMPARED_SAMPLES, REFIT_SAMPLES, SCORE_CHUNK
from gfprune_cli.flow.refit import ROWS_PER_INPUT
from gfprune_cli.pruning.memory import FLOAT, Pass, Phase
from gfprune_cli.pruning.verify import DOUBLES
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe

RECOVERY_COPIES = 5  # of the narrow weights: themselves, gradients, two moments, their average
COMPARING_MATRICES = 6  # of inputs by inputs, in float32: moments, ordered ones, their factor
REFITTING_MATRICES = 4  # a system and its factor
SECOND_ORDER = 3  # times what autograd keeps for first derivatives
DOUBLE_COPIES = 6  # of a network that is checked in float64, and what it narrows to, counted in float32
SINGLE_COPIES = 3  # of one that is too large for that
LOSSES, CHECKING, SCORING, COMPARING, REFITTING, RECOVERING = (
    "taking losses", "checking removal", "scoring", "comparing groups", "refitting", "recovering"
)  # fmt: skip


def phases_of(
    recipe: PruneRecipe, one: Pass, *, offload: bool, second_order: bool = False, params: int = 0
) -> list[Phase]:
    """What a run does with its memory; bytes of a sample are 0 where `one` is not known.

    Args:
        one: of the dense network.
        offload: the teacher stays in main memory.
        second_order: scoring may take the product with the Hessian exactly.
        params: of the dense network.
    """
    return list(_phases(recipe, one, offload=offload, second_order=second_order, params=params))


def _phases(
    recipe: PruneRecipe, one: Pass, *, offload: bool, second_order: bool, params: int
) -> Iterator[Phase]:
    several = len(recipe.targets) > 1
    copied = recipe.refit or recipe.recover > 0 or several or recipe.keep_loss is not None
    dense = int(copied and not offload)
    spare = int(recipe.keep_loss is not None)  # weights of the last network that keeps the limit
    masked = dense + spare + 2  # the weights that change, and what the masks leave of them
    kept = one.kept + (one.maps if second_order or not one.fuses else 0)
    scored = FLOAT * kept * (SECOND_ORDER if second_order else 1)
    yield Phase(LOSSES, masked, FLOAT * one.forward, CHUNK)
    if not recipe.removes:  # folding alone
        return
    checked = DOUBLE_COPIES if params <= DOUBLES else SINGLE_COPIES
    yield Phase(CHECKING, checked, 2 * FLOAT * one.forward, 1)
    yield Phase(
        SCORING, dense + spare + CRITERIA[recipe.criterion].copies, scored, min(SCORE_CHUNK, recipe.draws)
    )
    if recipe.layout == "adaptive":
        count, rest = COMPARED_SAMPLES, FLOAT * COMPARING_MATRICES * one.widest**2
        yield Phase(COMPARING, masked, FLOAT * one.forward, count, count, rest)
    if recipe.refit:
        count, rest = REFIT_SAMPLES, FLOAT * (REFITTING_MATRICES * one.widest**2 + targets(one))
        yield Phase(REFITTING, masked, FLOAT * one.forward, count, count, rest)
    if recipe.recover:
        batch = FinetuneRecipe.batch
        copies = dense + several + RECOVERY_COPIES * (1 - recipe.targets[0])
        yield Phase(RECOVERING, copies, FLOAT * one.kept, batch)


def targets(one: Pass) -> int:
    """Numbers of the dense outputs that a refit aims at."""
    return sum(
        min(places * REFIT_SAMPLES, ROWS_PER_INPUT * inputs) * channels
        for places, inputs, channels in one.layers
    )


def alternatives(
    recipe: PruneRecipe, one: Pass, *, offload: bool, device: str, params: int = 0
) -> dict[str, list[Phase]]:
    """Flags that were not given and take memory away -> the phases with them."""
    found: dict[str, list[Phase]] = {}
    without: dict[str, dict[str, Any]] = {
        "--no-refit": dict(refit=False),
        "--recover 0": dict(recover=0),
        "--no-refit --recover 0": dict(refit=False, recover=0),
        "--criterion taylor": dict(criterion="taylor"),
    }
    for flags, changes in without.items() if recipe.removes else ():  # folding alone does none of that
        if all(getattr(recipe, name) != value for name, value in changes.items()):
            found[flags] = phases_of(replace(recipe, **changes), one, offload=offload, params=params)
    if device != "cpu" and not offload:
        found["--offload-teacher"] = phases_of(recipe, one, offload=True, params=params)
    return found
