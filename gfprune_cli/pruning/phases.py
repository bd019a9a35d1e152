"""The phases of a prune run and the memory that each takes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from gfprune_cli.diffusion.loss import CHUNK
from gfprune_cli.flow import comparison, refit
from gfprune_cli.flow.criteria import CRITERIA
from gfprune_cli.flow.layers import LEAST_ROWS
from gfprune_cli.flow.least_squares import PIECE
from gfprune_cli.flow.loop import COMPARED_SAMPLES, REFIT_SAMPLES, SCORE_CHUNK
from gfprune_cli.pruning.fold import CHOOSE, FIT, OUTPUT_CHUNK
from gfprune_cli.pruning.memory import FLOAT, Pass, Phase
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery.memory import held_bytes

LEAST_COMPARED, LEAST_REFITTED = 4, 8  # samples, where there is no memory for more; half if it is short
COMPARING_MATRICES = 3  # moments in both precisions, their factor
COMPARING_ROWS = 2  # as they were read, and in the order in which they go
REFITTING_MATRICES = 2  # a system and its factor
REFITTING_SIDES = 6  # floats of each weight: as it was, the right side in both precisions, the solution
FOLDING_FACTORS = 0.5  # of the layers that may be folded: what is chosen, and what is tried
FOLDING_SIDES = 4  # of one layer's outputs, and of its weights
FEW_COPIES = 3  # of few rows: inputs, centred, scaled
DOUBLE = 8  # bytes
MOST_NARROW = 0.6  # of the parameters, where it is not worked out
PASSES = 2  # of the dense network and of the masked one, in turns
SECOND_ORDER = 3  # times what autograd keeps for first derivatives
SECOND_ORDER_COPIES = 6  # weights, masked ones, gradients, products, and their parts
DOUBLE_COPIES = 5  # of a network whose removal is checked in float64
MADE = 2  # copies of a layer's weights in float32, where they are kept in half: with and without masks
TURNS = (1, 2, 4, 8)  # in which a gradient may come, where memory is short
THRIFT: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True, "features": 0.0, "optimizer": "muon"},  # which small networks do not take else
    {"checkpointing": True, "features": 0.0, "optimizer": "muon", "ema": 0.0},
    {"checkpointing": True, "features": 0.0, "optimizer": "adafactor", "ema": 0.0},
)
Forms = list[Phase]  # of one phase, the best first
LOSSES, FOLDING, CHECKING, SCORING, COMPARING, REFITTING, RECOVERING = (
    "taking losses", "folding", "checking removal", "scoring", "comparing groups", "refitting", "recovering"
)  # fmt: skip


def phases_of(
    recipe: PruneRecipe,
    one: Pass,
    *,
    offload: bool,
    narrow: float = MOST_NARROW,
    stored: float = 1,
    folds: bool = False,
) -> list[Forms]:
    """What a run does with its memory; bytes of a sample are 0 where `one` is not known.

    Args:
        one: of the dense network.
        offload: the dense network is on a disk, or in the main memory of another device's machine; what is
            slower then comes into question.
        narrow: see `checks`.
        stored: bytes that the weights take, as a share of those in float32: less than 1 where they are kept
            in half precision, and made float32 layer by layer.
        folds: modulation layers are folded first.
    """
    several = len(recipe.targets) > 1
    copied = recipe.refit or recipe.recover > 0 or several or recipe.keep_loss is not None
    dense = int(copied and not offload)
    spare = int(recipe.keep_loss is not None)  # weights of the last network that keeps the limit
    masked = stored * (dense + spare + 1)  # those that change; behind masks they are made layer by layer
    made = MADE * FLOAT * max((inputs * outputs for _, inputs, outputs in one.layers), default=0)
    made *= stored < 1  # else a layer that has no mask is not made at all, and none is made twice
    beside = stored * several * (1 - recipe.targets[0])  # what is narrowed while the flow is to go on
    phases: list[Forms] = [[Phase(LOSSES, masked + beside, FLOAT * one.forward, CHUNK, rest=lambda _: made)]]
    if folds:
        rest = folding(one, made)
        phases.append([Phase(FOLDING, stored, FLOAT * one.forward, OUTPUT_CHUNK, rest=lambda _: rest)])
    phases.append(checks(one, narrow, stored, made))
    if not recipe.removes:  # folding alone
        return phases
    phases.append(scorings(recipe, one, stored * (dense + spare), stored, made, thrifty=offload))
    forward = FLOAT * one.forward
    compared = Phase(COMPARING, masked, forward, COMPARED_SAMPLES, LEAST_COMPARED)
    moments = partial(comparing, one, made)
    phases.append(looking(compared, moments, comparison.ROWS_PER_INPUT, thrifty=offload))
    if recipe.refit:
        copies = masked + (not offload)  # of the weights before a fit; else on a disk
        refitted = Phase(REFITTING, copies, PASSES * forward, REFIT_SAMPLES, LEAST_REFITTED)
        phases.append(looking(refitted, partial(refitting, one, made), refit.ROWS_PER_INPUT, thrifty=offload))
    if recipe.recover:
        phases.append(recoveries(recipe, one, dense + stored * several, thrifty=offload))
    return phases


def looking(phase: Phase, rest: Callable[[int, int], int], per_input: int, *, thrifty: bool) -> Forms:
    """A phase that looks at positions of layers: as usual, and at fewer of fewer samples.

    Args:
        rest: (positions for each input of a layer, samples at once) -> bytes that they take.
        per_input: such positions as usual.
    """
    forms = [replace(phase, rest=partial(rest, per_input))]
    if thrifty:
        few = {"per_input": 0}
        forms.append(replace(phase, least=phase.least // 2, rest=partial(rest, 0), settings=few))
    return forms


def folding(one: Pass, made: int) -> int:
    """Bytes of what layers with one row for each sample receive, of their factors, and of the fit of one.

    Args:
        made: bytes of the weights that are made at once.
    """
    rows = FIT + CHOOSE
    layers = [(inputs, outputs) for places, inputs, outputs in one.layers if places == 1]
    received = sum(rows * inputs for inputs, _ in layers)
    factors = FOLDING_FACTORS * sum(inputs * outputs for inputs, outputs in layers)
    fit = FOLDING_SIDES * max(((rows + inputs) * outputs for inputs, outputs in layers), default=0)
    return int(FLOAT * (received + factors + fit)) + made


def checks(one: Pass, narrow: float, stored: float, made: int) -> Forms:
    """The check of removal, in float64 where there is memory for it.

    Args:
        narrow: share of the parameters that it leaves in float32.
        stored: see `phases_of`; made: bytes of the weights that are made at once.
    """
    both = PASSES * FLOAT * one.forward
    double = Phase(CHECKING, DOUBLE_COPIES, 2 * both, 1, settings={"doubles": True})
    single = Phase(CHECKING, stored * (1 + narrow), both, 1, rest=lambda _: made, settings={"doubles": False})
    return [double, single] if stored == 1 else [single]


def scorings(recipe: PruneRecipe, one: Pass, others: float, own: float, made: int, *, thrifty: bool) -> Forms:
    """Scoring: with exact second derivatives, with finite differences, and in less memory for more time.

    Args:
        others: copies of the weights beside those that are scored; own: of those.
        made: bytes of the weights that are made at once.
    """
    criterion, wanted = CRITERIA[recipe.criterion], min(SCORE_CHUNK, recipe.draws)
    exact = Phase(
        SCORING,
        others + SECOND_ORDER_COPIES,
        FLOAT * (one.kept + one.maps) * SECOND_ORDER,
        wanted,
        settings={"exact": True},
    )
    forms = [exact] if recipe.criterion.startswith("gradient-flow") and own == 1 else []
    gradients, rest = criterion.copies - 1, lambda _: made
    forms.append(Phase(SCORING, others + own + gradients, FLOAT * one.kept, wanted, rest=rest))
    if thrifty and one.recomputed is not None:
        for turns in TURNS if criterion.turns else TURNS[:1]:
            copies, sample = others + own + gradients / turns, FLOAT * one.recomputed
            settings = {"recomputes": True, "turns": turns}
            forms.append(Phase(SCORING, copies, sample, wanted, rest=rest, settings=settings))
    return forms


def recoveries(recipe: PruneRecipe, one: Pass, teachers: float, *, thrifty: bool) -> Forms:
    """Recovery, with what gives where memory is short: fields of `FinetuneRecipe`.

    Args:
        teachers: copies of the dense network's weights that are there.
    """
    left = 1 - recipe.targets[0]
    outputs = sum(places * channels for places, _, channels in one.layers)
    weights = sum(inputs * outputs for _, inputs, outputs in one.layers)
    features = int(left * outputs)  # of the teacher, until the way back
    forms = []
    for settings in THRIFT if thrifty and one.recomputed is not None else THRIFT[:1]:
        trained = FinetuneRecipe(model="", **settings).settled(left * weights)
        held = held_bytes(trained, student=left, training=left, teacher=teachers)
        kept = one.recomputed if settings else one.kept + features
        copies, batch = sum(held.values()) / FLOAT, FinetuneRecipe.batch
        forms.append(Phase(RECOVERING, copies, FLOAT * (kept or 0), batch, settings=settings))
    return forms


def comparing(one: Pass, made: int, looks: int, samples: int) -> int:
    """Bytes of the moments of the layer for which they take most: as wide as its inputs, or as its rows.

    Args:
        made: bytes of the weights that are made at once.
        looks: positions for each input of a layer.
    """
    sizes = [0]
    for places, inputs, outputs in one.layers:
        rows = min(places * samples, max(LEAST_ROWS, looks * inputs))
        few = rows < inputs
        read = FLOAT * COMPARING_ROWS * rows * inputs
        weights = outputs * (FLOAT * inputs + DOUBLE * (rows if few else 2 * inputs))
        sizes.append(read + weights + COMPARING_MATRICES * DOUBLE * (rows if few else inputs) ** 2)
    return max(sizes) + made


def refitting(one: Pass, made: int, looks: int, samples: int) -> int:
    """The same for the normal equations, with the dense outputs that the layer aims at."""
    sizes = [0]
    for places, inputs, outputs in one.layers:
        rows = min(places * samples, max(LEAST_ROWS, looks * inputs))
        few = rows < inputs
        held = FEW_COPIES * rows * inputs if few else PIECE * inputs
        square = DOUBLE * REFITTING_MATRICES * (rows if few else inputs) ** 2
        sizes.append(FLOAT * (held + rows * outputs + REFITTING_SIDES * inputs * outputs) + square)
    return max(sizes) + made


def alternatives(
    recipe: PruneRecipe, one: Pass, narrow: float = MOST_NARROW, stored: float = 1, folds: bool = False
) -> dict[str, list[Forms]]:
    """Flags that were not given and take memory away -> the phases with them, the dense network elsewhere."""
    found: dict[str, list[Forms]] = {}
    if not recipe.removes:  # folding alone does none of that
        return found
    without: dict[str, dict[str, Any]] = {
        "--no-refit": dict(refit=False),
        "--recover 0": dict(recover=0),
        "--no-refit --recover 0": dict(refit=False, recover=0),
        "--criterion taylor": dict(criterion="taylor"),
        **({"--fold 0": dict(fold=0.0)} if folds else {}),
    }
    for flags, changes in without.items():
        if all(getattr(recipe, name) != value for name, value in changes.items()):
            changed, still = replace(recipe, **changes), folds and "fold" not in changes
            found[flags] = phases_of(changed, one, offload=True, narrow=narrow, stored=stored, folds=still)
    return found
