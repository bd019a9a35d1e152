"""gfprune against its peers: the same dense model, data, parameters kept and gradients, three seeds.

    python benchmarks/quality.py --quick
    python benchmarks/quality.py

Every method removes the same share of parameters (within 1 %) and then spends what scoring has left of one
budget of gradients, counted in samples, on training. Peers are those of `peers.py`, finetuned with the plain
denoising loss as they are published; rows named "distilled" are controls. gfprune runs `gfprune prune` and
`gfprune finetune` with their defaults. A second model, of other widths and other images, is trained first.

Writes quality.md and its plot to docs/benchmarks/, the quick form to quick/ in it. Runs that are done are
kept in --work and not repeated.
"""

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peers import parameters, pruned_by
from provenance import PAGES
from report_quality import write_report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_demo import arguments as training_arguments
from train_demo import train as train_dense
from yardstick import Subject, Yardstick, demo, pictures_of, subject

import gfprune_cli as gfprune
from gfprune_cli.data.draws import Draws
from gfprune_cli.processes import Processes
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery.losses import RecoveryLoss, Weights
from gfprune_cli.recovery.trainer import Trainer

HERE = Path(__file__).parent
SECOND = dict(categories=("Objects", "Travel & Places"), widths=(24, 40, 64, 96), lr=1.5e-3)
SUBJECTS = ("demo", "second")
PEERS = ("magnitude", "taylor", "random", "diff-pruning")
BATCH = 16
SCORING = 512  # gradients that a peer's scoring may take: as many as gfprune's own scorings take by default
ALL_IMAGES = 10**6


@dataclass(frozen=True)
class Form:
    """How much is run.

    Args:
        gradients: of every method, scoring included, counted in samples.
        once: methods that run with the first seed only.
        prune: settings of `gfprune prune` other than its defaults.
        samples, sample_steps: drawn from every network.
        second_steps: training steps of the second dense model.
    """

    gradients: int
    seeds: int
    sparsities: tuple[float, ...]
    methods: tuple[str, ...]
    once: tuple[str, ...]
    samples: int
    sample_steps: int
    second_steps: int
    prune: dict[str, Any]


METHODS = ("gfprune", *PEERS)
CONTROLS = ("diff-pruning, distilled", "gfprune, MACs of the peers")
FULL = Form(
    gradients=3200,
    seeds=3,
    sparsities=(0.44, 0.75),
    methods=("gfprune", "magnitude", "diff-pruning"),
    once=("taylor", "random", *CONTROLS),
    samples=128,
    sample_steps=20,
    second_steps=3600,
    prune={},
)
QUICK = replace(FULL, seeds=1, once=(), samples=64, sample_steps=10, second_steps=600)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    subject: str
    method: str
    sparsity: float
    seed: int

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def second_folder(work: Path) -> Path:
    return work / "second"


def train_second(work: Path, steps: int) -> None:
    """Train the second dense model, unless it is there."""
    folder = second_folder(work)
    record = folder / "training.json"
    if record.exists() and json.loads(record.read_text())["steps"] >= steps:
        return
    options = training_arguments().parse_args(
        ["--data", str(HERE / "data" / "noto-objects-32.npz"), "--out", str(folder), "--steps", str(steps)]
    )
    vars(options).update(SECOND)
    train_dense(options)


def open_subject(name: str, work: Path) -> Subject:
    if name == "demo":
        return demo()
    folder = second_folder(work)
    return subject(name, str(folder), folder / "images.npz")


def macs_of(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of one sample, counted by PyTorch."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() // 2


def train(
    target: Subject, model: nn.Module, draws: Draws, steps: int, seed: int, *, distill: bool
) -> nn.Module:
    """The trainer of `gfprune finetune`, with the plain denoising loss or with its default losses."""
    losses = {} if distill else {"denoise": 1.0, "distill": 0.0}
    recipe = FinetuneRecipe(model=target.model, steps=steps, batch=BATCH, seed=seed, **losses)
    weights = Weights(recipe.denoise, recipe.distill, recipe.features, recipe.jacobian, recipe.min_snr)
    loss = RecoveryLoss(model, target.dense, target.process, weights, None, "fp32")
    trainer = Trainer(model.requires_grad_(True), loss, draws, recipe, Processes(None, torch.device("cpu")))
    for step in range(steps):
        trainer.step(step, lambda: False)
    trainer.ema.copy_to(model.parameters())
    return model.requires_grad_(False)


def by_peer(target: Subject, cell: Cell, form: Form) -> tuple[nn.Module, int]:
    """(network, gradients taken) of a peer."""
    peer, _, control = cell.method.partition(", ")
    draws = Draws(pictures_of(target), target.process.steps, cell.seed)
    scoring = min(SCORING, form.gradients // 4)
    model, taken = pruned_by(
        peer, lambda: copy.deepcopy(target.dense), cell.sparsity, target.process, draws, scoring
    )
    steps = (form.gradients - taken) // BATCH
    return train(target, model, draws, steps, cell.seed, distill=bool(control)), taken + steps * BATCH


def by_gfprune(target: Subject, cell: Cell, form: Form) -> tuple[nn.Module, int]:
    """(network, gradients taken) of `gfprune prune` and `gfprune finetune`."""
    draws = Draws(pictures_of(target), target.process.steps, cell.seed)
    uniform, _ = pruned_by(
        "random", lambda: copy.deepcopy(target.dense), cell.sparsity, target.process, draws, 0
    )
    size = target.held_out.shape[-1]
    settings: dict[str, Any] = {"sparsity": 1 - parameters(uniform) / parameters(target.dense)}
    if cell.method.endswith("MACs of the peers"):
        share = 1 - macs_of(uniform, size) / macs_of(target.dense, size)
        settings = {"sparsity": share, "budget": "macs"}
    common = dict(data=str(target.data), images=ALL_IMAGES, seed=cell.seed)
    with tempfile.TemporaryDirectory() as folder:
        pruned, tuned = Path(folder) / "pruned", Path(folder) / "tuned"
        settings = {**form.prune, **settings}
        result = gfprune.prune(target.model, out=pruned, **settings, **common)
        recipe = json.loads((pruned / "gfprune.json").read_text())["recipe"]
        training = recipe["iterations"] * recipe["steps_per_iteration"] * recipe["batch"]
        taken = round(result.scoring_gradients * recipe["draws"]) + training
        steps = (form.gradients - taken) // BATCH
        assert steps > 0, f"{taken} gradients are gone after pruning, of {form.gradients}"
        gfprune.finetune(pruned, out=tuned, steps=steps, batch=BATCH, save_every=0, sample_every=0, **common)
        return gfprune.load(tuned), taken + steps * BATCH


def run(cell: Cell, form: Form, work: Path) -> dict[str, Any]:
    """One cell, in a process of its own with one thread."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    target = open_subject(cell.subject, work)
    start = time.perf_counter()
    if cell.method == "dense":
        model, taken = target.dense, 0
    elif cell.method.startswith("gfprune"):
        model, taken = by_gfprune(target, cell, form)
    else:
        model, taken = by_peer(target, cell, form)
    seconds = time.perf_counter() - start
    found = yardstick(target, form, work).measure(model)
    macs = macs_of(model, target.held_out.shape[-1])
    return {**asdict(cell), **found, "macs": macs, "gradients": taken, "seconds": seconds}


def yardstick(target: Subject, form: Form, work: Path) -> Yardstick:
    cache = work / f"dense-{target.name}-{form.samples}-{form.sample_steps}.safetensors"
    return Yardstick(target, form.samples, form.sample_steps, cache=cache)


def measure_dense(name: str, form: Form, work: Path) -> None:
    """Take the dense model's numbers once, before processes that need them run side by side."""
    yardstick(open_subject(name, work), form, work)


def grid(form: Form, name: str) -> list[Cell]:
    """Every run about one dense model; the dense model itself is one of them."""
    return [Cell(name, "dense", 0.0, 0)] + [
        Cell(name, method, sparsity, seed)
        for seed in range(form.seeds)
        for sparsity in form.sparsities
        for method in (form.methods if seed else form.methods + form.once)
    ]


class Store:
    """What runs found, one JSON line each; those of a form and of the defaults of now are not repeated."""

    def __init__(self, path: Path, form: Form) -> None:
        defaults = {"prune": PruneRecipe().document(), "finetune": FinetuneRecipe(model="").document()}
        self.path, self.form = path, json.dumps(asdict(form) | {"defaults": defaults}, sort_keys=True)
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        self.found = {entry["key"]: entry for entry in entries if entry["form"] == self.form}

    def add(self, cell: Cell, entry: dict[str, Any]) -> None:
        self.found[cell.key] = entry | {"key": cell.key, "form": self.form}
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[cell.key]) + "\n")


def run_grid(form: Form, work: Path, jobs: int) -> list[dict[str, Any]]:
    """Every cell's numbers. The second model trains while the first one's cells run."""
    store = Store(work / "results.jsonl", form)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        trained = pool.submit(train_second, work, form.second_steps)
        for name in SUBJECTS:
            if name == "second":
                trained.result()
            left = [cell for cell in grid(form, name) if cell.key not in store.found]
            if left:
                pool.submit(measure_dense, name, form, work).result()
            futures = {pool.submit(run, cell, form, work): cell for cell in left}
            for future in as_completed(futures):
                store.add(futures[future], future.result())
                print(" ".join(map(str, asdict(futures[future]).values())), flush=True)
    return [store.found[cell.key] for name in SUBJECTS for cell in grid(form, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two peers, no controls, a less trained second model"
    )
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"), help="kept between runs")
    parser.add_argument("--out", type=Path, help="folder (default: docs/benchmarks, or quick/ in it)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    form = QUICK if options.quick else FULL
    work = options.work / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    entries = run_grid(form, work, options.jobs)
    command = "python benchmarks/quality.py" + (" --quick" if options.quick else "")
    folder = options.out or (PAGES / "quick" if options.quick else PAGES)
    print(write_report(entries, form, folder, command=command))


if __name__ == "__main__":
    main()
