"""The phases of a prune run and the memory that each takes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from gfprune_cli.diffusion.loss import CHUNK
from gfprune_cli.flow import comparison, refit
from gfprune_cli.flow.criteria import CRITERIA
from gfprune_cli.flow.layers import LEAST_ROWS
from gfprune_cli.flow.least_squares import PIECE
from gfprune_cli.flow.loop import COMPARED_SAMPLES, REFIT_SAMPLES, SCORE_CHUNK
from gfprune_cli.pruning.memory import FLOAT, Pass, Phase
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery.memory import held_bytes

LEAST_COMPARED, LEAST_REFITTED = 4, 8  # samples, where there is no memory for more
COMPARING_MATRICES = 3  # moments in both precisions, their factor
REFITTING_MATRICES = 2  # a system and its factor
FEW_COPIES = 3  # of few rows: inputs, centred, scaled
DOUBLE = 8  # bytes
PASSES = 2  # of the dense network and of the masked one, in turns
SECOND_ORDER = 3  # times what autograd keeps for first derivatives
SECOND_ORDER_COPIES = 6  # weights, masked ones, gradients, products, and their parts
SINGLE_COPIES = 2  # of a network whose removal is checked, and what it narrows to
DOUBLE_COPIES = 5  # of one that is checked in float64
LOSSES, CHECKING, SCORING, COMPARING, REFITTING, RECOVERING = (
    "taking losses", "checking removal", "scoring", "comparing groups", "refitting", "recovering"
)  # fmt: skip


def phases_of(recipe: PruneRecipe, one: Pass, *, offload: bool, second_order: bool = False) -> list[Phase]:
    """What a run does with its memory; bytes of a sample are 0 where `one` is not known.

    Args:
        one: of the dense network.
        offload: the dense network is on a disk, or in the main memory of another device's machine.
        second_order: scoring may take the product with the Hessian exactly.
    """
    return list(_phases(recipe, one, offload=offload, second_order=second_order))


def _phases(recipe: PruneRecipe, one: Pass, *, offload: bool, second_order: bool) -> Iterator[Phase]:
    several = len(recipe.targets) > 1
    copied = recipe.refit or recipe.recover > 0 or several or recipe.keep_loss is not None
    dense = int(copied and not offload)
    spare = int(recipe.keep_loss is not None)  # weights of the last network that keeps the limit
    masked = dense + spare + 1  # the weights that change; behind masks they are made layer by layer
    kept = one.kept + (one.maps if second_order else 0)
    scored = FLOAT * kept * (SECOND_ORDER if second_order else 1)
    yield Phase(LOSSES, masked, FLOAT * one.forward, CHUNK)
    if not recipe.removes:  # folding alone
        return
    yield Phase(CHECKING, SINGLE_COPIES, PASSES * FLOAT * one.forward, 1)
    copies = dense + spare + (SECOND_ORDER_COPIES if second_order else CRITERIA[recipe.criterion].copies)
    yield Phase(SCORING, copies, scored, min(SCORE_CHUNK, recipe.draws))
    compared, refitted = partial(comparing, one), partial(refitting, one)
    yield Phase(COMPARING, masked, FLOAT * one.forward, COMPARED_SAMPLES, LEAST_COMPARED, compared)
    if recipe.refit:
        both = PASSES * FLOAT * one.forward
        yield Phase(REFITTING, masked, both, REFIT_SAMPLES, LEAST_REFITTED, refitted)
    if recipe.recover:
        batch = FinetuneRecipe.batch
        left = 1 - recipe.targets[0]
        held = held_bytes(FinetuneRecipe(model=""), student=left, training=left, teacher=dense + several)
        yield Phase(RECOVERING, sum(held.values()) / FLOAT, FLOAT * one.kept, batch)


def checked_in_double(one: Pass) -> Phase:
    """The check of removal where there is memory for it in float64."""
    return Phase(CHECKING, DOUBLE_COPIES, 2 * PASSES * FLOAT * one.forward, 1)


def comparing(one: Pass, samples: int) -> int:
    """Bytes of the moments of the layer for which they take most: as wide as its inputs, or as its rows."""
    sizes = [0]
    for places, inputs, _ in one.layers:
        rows = min(places * samples, max(LEAST_ROWS, comparison.ROWS_PER_INPUT * inputs))
        few = rows < inputs
        sizes.append(
            rows * inputs * (FLOAT + DOUBLE) + COMPARING_MATRICES * DOUBLE * (rows if few else inputs) ** 2
        )
    return max(sizes)


def refitting(one: Pass, samples: int) -> int:
    """The same for the normal equations, with the dense outputs that the layer aims at."""
    sizes = [0]
    for places, inputs, outputs in one.layers:
        rows = min(places * samples, max(LEAST_ROWS, refit.ROWS_PER_INPUT * inputs))
        few = rows < inputs
        held = FEW_COPIES * rows * inputs if few else PIECE * inputs
        square = DOUBLE * REFITTING_MATRICES * (rows if few else inputs) ** 2
        sizes.append(FLOAT * (held + rows * outputs) + square)
    return max(sizes)


def alternatives(recipe: PruneRecipe, one: Pass) -> dict[str, list[Phase]]:
    """Flags that were not given and take memory away -> the phases with them, the dense network elsewhere."""
    found: dict[str, list[Phase]] = {}
    without: dict[str, dict[str, Any]] = {
        "--no-refit": dict(refit=False),
        "--recover 0": dict(recover=0),
        "--no-refit --recover 0": dict(refit=False, recover=0),
        "--criterion taylor": dict(criterion="taylor"),
    }
    for flags, changes in without.items() if recipe.removes else ():  # folding alone does none of that
        if all(getattr(recipe, name) != value for name, value in changes.items()):
            found[flags] = phases_of(replace(recipe, **changes), one, offload=True)
    return found
