"""Which runs `quality.py` makes, what each of them depends on, and where their numbers are kept."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe

Entry = dict[str, Any]
SCORING = 512  # the most gradients that a peer's scoring takes; a quarter of the run's, where that is less
RECIPES = ("prune", "finetune")
UNUSED = {"length_factor": 1.0, "teacher_precision": "fp32", "runtime": "eager", "time_batch": 1}
PUBLISHED: dict[str, Any] = {
    "denoise": 1.0,
    "distill": 0.0,
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "batch": 16,
    "image_weight": 0.0,
    "features": 0.0,
    "timesteps": "stratified",
}
TUNED = ", tuned"
FINETUNED = ", finetuned"


@dataclass(frozen=True)
class Form:
    """How much is run.

    Args:
        lengths: gradients of every method, scoring included, counted in samples; the shortest first.
        seeds: how many, of each length.
        once: methods that run at the shortest length with the first seed only.
        tunings: (optimizer, learning rate) that a tuned peer may choose from.
        samples, sample_steps: drawn from every network.
        training: steps of the dense networks that are trained first.
        prune: settings of `gfprune prune` other than its defaults.
    """

    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]
    methods: tuple[str, ...]
    once: tuple[str, ...]
    tunings: tuple[tuple[str, float], ...]
    samples: int
    sample_steps: int
    training: dict[str, int]
    prune: dict[str, Any] = field(default_factory=dict)


FULL = Form(
    lengths=(3200, 16_000, 64_000),
    seeds=(3, 3, 1),
    sparsities=(0.44, 0.75),
    methods=(
        *("gfprune", "magnitude", "diff-pruning", "magnitude, tuned", "diff-pruning, tuned"),
        *("magnitude, finetuned", "diff-pruning, finetuned"),
    ),
    once=("taylor", "random"),
    tunings=(("adamw", 5e-4), ("adamw", 1.5e-3), ("adamw", 3e-3)),
    samples=128,
    sample_steps=20,
    training={"second": 3600, "third": 3000},
)
QUICK = replace(
    FULL,
    lengths=FULL.lengths[:1],
    seeds=(1,),
    methods=("gfprune", "magnitude", "magnitude, tuned", "magnitude, finetuned"),
    once=(),
    tunings=(("adamw", 1.5e-3),),
    samples=64,
    sample_steps=10,
    training={"second": 600, "third": 600},
)


def peer_of(method: str) -> str:
    """A method without the way in which it is trained."""
    return method.removesuffix(TUNED).removesuffix(FINETUNED)


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `optimizer` and `rate` are those of a tuned peer; without them it has to wait."""

    subject: str
    method: str
    sparsity: float = 0.0
    seed: int = 0
    gradients: int = 0
    optimizer: str = ""
    rate: float = 0.0

    @property
    def peer(self) -> str:
        return peer_of(self.method)

    @property
    def tuned(self) -> bool:
        return self.method.endswith(TUNED)

    @property
    def waits(self) -> bool:
        return self.tuned and not self.optimizer


def peer_recipe(cell: Cell, **sizes: Any) -> FinetuneRecipe:
    """How a peer trains.

    As published; distilled, with what its trials chose; or as `gfprune finetune` does with its defaults.
    """
    settings: dict[str, Any] = PUBLISHED
    if cell.tuned:
        plain = {key: PUBLISHED[key] for key in ("image_weight", "features", "timesteps")}
        settings = {"optimizer": cell.optimizer, "learning_rate": cell.rate, **plain}
    elif cell.method.endswith(FINETUNED):
        settings = {}
    return FinetuneRecipe(seed=cell.seed, **settings, **{"model": "", **sizes})


def said(recipe: dict[str, Any]) -> dict[str, Any]:
    """Settings that change something: an option that came later counts only where it is in use."""
    return {
        key: value
        for key, value in recipe.items()
        if value is not None and value is not False and UNUSED.get(key) != value
    }


def told_apart(key: str) -> str:
    """The key of a run, its recipes without what is not in use."""
    found = json.loads(key)
    return json.dumps(found | {part: said(found[part]) for part in RECIPES if part in found}, sort_keys=True)


def depends_on(cell: Cell, form: Form) -> dict[str, Any]:
    """Settings and defaults, other than the cell's own, that its numbers depend on."""
    found: dict[str, Any] = {"samples": form.samples, "sample_steps": form.sample_steps}
    if cell.method == "dense":
        return found
    recipe = FinetuneRecipe(model="") if cell.method == "gfprune" else peer_recipe(cell)
    length = replace(recipe, steps=max(1, cell.gradients // recipe.batch))
    found["finetune"] = recipe.document() | {"denoise": length.denoise_weight}  # which is the length's
    if recipe.learning_rate is None and length.length_factor < 1:  # and so is the rate
        found["finetune"] |= {"length_factor": length.length_factor, "rate_follows": "excess"}
    if cell.method == "gfprune":
        return found | {"prune": PruneRecipe().document() | form.prune}
    return found | {"scoring": SCORING}


class Store:
    """What runs found, one JSON line each.

    A line counts for as long as the network, its images, the settings and the defaults behind it are the
    same; it names the commit that it was made at.

    Args:
        fingerprints: subject -> that of its network and images, once known.
    """

    def __init__(self, path: Path, form: Form, fingerprints: dict[str, str]) -> None:
        self.path, self.form, self.fingerprints = path, form, fingerprints
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: dict[str, Entry] = {told_apart(run["key"]): run for run in map(json.loads, lines)}

    def key(self, cell: Cell) -> str:
        network = self.fingerprints[cell.subject]
        return told_apart(json.dumps(asdict(cell) | depends_on(cell, self.form) | {"network": network}))

    def get(self, cell: Cell) -> Entry | None:
        """The numbers of a run; None if it has not been made."""
        if cell.waits or cell.subject not in self.fingerprints:
            return None
        return self.entries.get(self.key(cell))

    def add(self, cell: Cell, entry: Entry) -> None:
        key = self.key(cell)
        self.entries[key] = entry | {"key": key}
        with self.path.open("a") as file:
            file.write(json.dumps(self.entries[key]) + "\n")

    def resolved(self, cell: Cell) -> Cell:
        """A tuned peer's cell with what its trials chose: the least held-out loss; as it is until then."""
        losses = {trial: entry["loss"] for trial in trials(self.form, cell) if (entry := self.get(trial))}
        if len(losses) < len(self.form.tunings):
            return cell
        best = min(losses, key=losses.__getitem__)
        return replace(cell, optimizer=best.optimizer, rate=best.rate)


def trials(form: Form, cell: Cell) -> list[Cell]:
    """The runs that choose a tuned peer's optimizer and rate, all at the shortest length with seed 0."""
    first = replace(cell, seed=0, gradients=form.lengths[0])
    return [replace(first, optimizer=name, rate=rate) for name, rate in form.tunings]


def cells(form: Form, subject: str) -> list[Cell]:
    """Every row and seed of the page about one dense network, the network itself among them."""
    listed = [Cell(subject, "dense")]
    for length, seeds in zip(form.lengths, form.seeds, strict=True):
        for seed in range(seeds):
            once = form.once if (length, seed) == (form.lengths[0], 0) else ()
            listed += [
                Cell(subject, method, sparsity, seed, length)
                for sparsity in form.sparsities
                for method in form.methods + once
            ]
    return listed


def ready(wanted: Iterable[Cell], store: Store) -> list[Cell]:
    """Runs that are left to make and can be made now; a tuned peer's trials come before it."""
    runnable: dict[Cell, None] = {}
    for cell in wanted:
        resolved = store.resolved(cell) if cell.tuned else cell
        runs = trials(store.form, cell) if resolved.waits else [resolved]
        runnable |= dict.fromkeys(run for run in runs if store.get(run) is None)
    return list(runnable)


@dataclass(frozen=True)
class Found:
    """What a page is written from.

    Args:
        entries: rows of the page; of a tuned peer's trials only the one that was chosen.
        tried: all trials.
        missing: what the form asks for and nobody has run.
    """

    entries: list[Entry]
    tried: list[Entry]
    missing: list[Cell]


def collect(form: Form, subjects: Sequence[str], store: Store) -> Found:
    found = Found([], [], [])
    for subject in subjects:
        for cell in cells(form, subject):
            entry = store.get(store.resolved(cell) if cell.tuned else cell)
            if entry is None:
                found.missing.append(cell)
            else:
                found.entries.append(entry)
            if cell.tuned and (cell.gradients, cell.seed) == (form.lengths[0], 0):
                found.tried.extend(trial for run in trials(form, cell) if (trial := store.get(run)))
    return found
