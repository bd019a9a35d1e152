"""One run of `quality.py`: a network is pruned and trained within its gradients, and measured.

entry = run(cell, form, place, work)
"""

import copy
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from grid import SCORING, Cell, Entry, Form, peer_recipe
from peers import at_rate, macs_of, parameters, pruned_by
from study import ALL_IMAGES
from subjects import Place
from torch import nn
from yardstick import Subject, Yardstick, pictures_of

import gfprune_cli as gfprune
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.losses import FeaturePair, RecoveryLoss
from gfprune_cli.recovery.recover import channels_last
from gfprune_cli.recovery.teacher import Correspondence
from gfprune_cli.recovery.trainer import Trainer
from gfprune_cli.runtime.device import device_name
from gfprune_cli.runtime.processes import Processes

TOLERANCE = 0.01  # of the dense network: how far two rows may differ that count as equal
SHARES = (1.0, 0.75, 0.5)  # of the way from the smaller of the peers' two shares to the larger, to be tried


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulates of one sample."""

    params: float
    macs: float

    @classmethod
    def of(cls, model: nn.Module) -> "Size":
        return cls(parameters(model), macs_of(model))

    def share(self, dense: "Size") -> "Size":
        return Size(self.params / dense.params, self.macs / dense.macs)


@dataclass(frozen=True)
class Outcome:
    """A trained network, and what it took.

    Args:
        gradients: counted in samples.
        work: multiply-accumulates; see `work_of`.
    """

    model: nn.Module
    gradients: int
    work: float


def work_of(dense: Size, pruned: Size, scored: float, trained: int, *, distilled: bool) -> float:
    """Multiply-accumulates of a run, estimated: a backward pass counts as two forward passes.

    Args:
        scored: gradients that were taken before training, all counted at the dense network's cost, though
            some of them are of networks that are narrower already.
        trained: gradients of the pruned network; with distillation the dense one runs forward for each.
    """
    teacher = dense.macs if distilled else 0.0
    return 3 * dense.macs * scored + (3 * pruned.macs + teacher) * trained


def check_equal(kept: Size, peers: Size) -> None:
    """Both are shares of the dense network; what is measured may keep less than the peers, and never more.

    Raises:
        ValueError: the rows are not equal.
    """
    if max(kept.params - peers.params, kept.macs - peers.macs) > TOLERANCE:
        raise ValueError(
            f"rows are not equal: {kept.params:.1%} of the parameters and {kept.macs:.1%} of the MACs,"
            f" where the peers keep {peers.params:.1%} and {peers.macs:.1%}"
        )


def layers_of_peer(model: nn.Module, dense: nn.Module) -> Correspondence:
    """How a peer's layers lie in the dense network, told by their biases, which nothing has changed yet."""
    theirs = dict(dense.named_modules())
    positions = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            equal = layer.bias[:, None] == theirs[name].bias[None]
            if bool((equal.sum(1) == 1).all()):
                positions[name] = equal.int().argmax(1)
    return Correspondence(positions, {name: name for name in positions}, {})


def train(target: Subject, model: nn.Module, draws: Draws, recipe: FinetuneRecipe) -> nn.Module:
    """The trainer of `gfprune finetune`; returns the averaged weights."""
    channels_last(model)  # as finetune does it: seconds are compared
    channels_last(target.dense)
    pair = None
    if recipe.feature_weight:
        pair = FeaturePair(model, target.dense, layers_of_peer(model, target.dense))
    recipe = at_rate(recipe, model, target.dense, target.process, draws)
    loss = RecoveryLoss(model, target.dense, target.process, recipe, pair, "fp32")
    processes = Processes(None, target.held_out.device)
    trainer = Trainer(model.requires_grad_(True), loss, draws, recipe, processes)
    for step in range(recipe.steps):
        trainer.step(step, lambda: False)
    if pair is not None:
        pair.close()
    trainer.finish()
    return model.requires_grad_(False)


def draws_of(target: Subject, seed: int) -> Draws:
    return Draws(pictures_of(target), target.process.steps, seed)


def uniform_share(target: Subject, sparsity: float) -> Size:
    """What the peers' rule keeps: one ratio for all layers, nearest to the sparsity of parameters."""
    draws = draws_of(target, 0)
    model, _ = pruned_by("random", lambda: copy.deepcopy(target.dense), sparsity, target.process, draws, 0)
    return Size.of(model).share(Size.of(target.dense))


def by_peer(target: Subject, cell: Cell) -> Outcome:
    """A peer, as published or tuned."""
    draws = draws_of(target, cell.seed)
    scoring = min(SCORING, cell.gradients // 4)
    dense = Size.of(target.dense)
    model, scored = pruned_by(
        cell.peer, lambda: copy.deepcopy(target.dense), cell.sparsity, target.process, draws, scoring
    )
    size = Size.of(model)
    batch = peer_recipe(cell).batch
    recipe = peer_recipe(cell, model=target.model, steps=(cell.gradients - scored) // batch)
    trained = recipe.steps * batch
    work = work_of(dense, size, scored, trained, distilled=recipe.distill > 0)
    return Outcome(train(target, model, draws, recipe), scored + trained, work)


def prune_defaults(target: Subject, cell: Cell, form: Form, share: float, out: Path) -> Any:
    """`gfprune prune` with its defaults, for at most a share of the parameters and of the MACs."""
    settings = {**form.prune, "budget": "both", "recover": 0, "sparsity": 1 - share}
    return gfprune.prune(target.model, out=out, **settings, **common_settings(target, cell))


def common_settings(target: Subject, cell: Cell) -> dict[str, Any]:
    device = str(target.held_out.device)
    data: dict[str, Any] = dict(data=str(target.data), images=ALL_IMAGES)
    return data | dict(seed=cell.seed, device=device, precision="fp32")


def share_for_gfprune(target: Subject, cell: Cell, form: Form, peers: Size) -> float:
    """The share of both that makes it equal to the peers, whose two shares differ.

    The largest of some between the two whose network keeps no more of either than theirs; the smaller, if
    none does. The runs that tell are the benchmark's own, and are not counted.
    """
    smaller, larger = sorted((peers.params, peers.macs))
    if larger - smaller <= TOLERANCE:
        return smaller
    slack = TOLERANCE / 10  # shares are counted here and in the budget
    for part in SHARES:
        share = smaller + part * (larger - smaller)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pruned"
            prune_defaults(target, cell, form, share, out)
            kept = Size.of(gfprune.load(out)).share(Size.of(target.dense))
        if kept.params <= peers.params + slack and kept.macs <= peers.macs + slack:
            return share
    return smaller


def by_gfprune(target: Subject, cell: Cell, form: Form, share: float) -> Outcome:
    """`gfprune prune` and `gfprune finetune` with their defaults, within a share of both."""
    batch = FinetuneRecipe(model="").batch
    with tempfile.TemporaryDirectory() as folder:
        pruned, tuned = Path(folder) / "pruned", Path(folder) / "tuned"
        result = prune_defaults(target, cell, form, share, pruned)
        scored = math.ceil(result.scoring_gradients)
        steps = (cell.gradients - scored) // batch
        if steps <= 0:
            raise ValueError(f"{scored} gradients are gone after pruning, of {cell.gradients}")
        common = common_settings(target, cell)
        gfprune.finetune(pruned, out=tuned, steps=steps, save_every=0, sample_every=0, **common)
        model = nn.Module.to(gfprune.load(tuned), target.held_out.device)
    trained = steps * batch
    work = work_of(Size.of(target.dense), Size.of(model), scored, trained, distilled=True)
    return Outcome(model, scored + trained, work)


def timed(target: Subject, cell: Cell, form: Form) -> tuple[Outcome, float]:
    """The network that a cell is about, and the seconds of processor time that it took.

    Raises:
        ValueError: it keeps more than the peers' widths do.
    """
    if cell.method == "dense":
        return Outcome(target.dense, 0, 0.0), 0.0
    peers = uniform_share(target, cell.sparsity)
    share = share_for_gfprune(target, cell, form, peers) if cell.method == "gfprune" else 1.0
    start = time.process_time()
    outcome = by_gfprune(target, cell, form, share) if cell.method == "gfprune" else by_peer(target, cell)
    seconds = time.process_time() - start
    check_equal(Size.of(outcome.model).share(Size.of(target.dense)), peers)
    return outcome, seconds


def run(cell: Cell, form: Form, place: Place, work: Path, device: str = "cpu") -> Entry:
    """One cell, in a process of its own with one thread.

    Processor time: other work on the machine stretches it less than it does the clock's. A rate at which a
    tuned peer's loss is no longer finite counts as infinite loss.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    target = place.open().on(torch.device(device))
    try:
        outcome, seconds = timed(target, cell, form)
    except GfpruneError as error:
        if not cell.tuned or "not finite" not in str(error):
            raise
        return asdict(cell) | {"loss": math.inf, "failed": str(error)}
    numbers = yardstick(target, form, work).measure(outcome.model)
    size = Size.of(outcome.model)
    spent = {"gradients_spent": outcome.gradients, "work": outcome.work, "seconds": seconds}
    spent["device"] = device_name(torch.device(device))
    return asdict(cell) | numbers | asdict(size) | spent


def yardstick(target: Subject, form: Form, work: Path) -> Yardstick:
    """The dense network's own numbers are kept in a file from one process to the next."""
    name = f"dense-{target.name}-{target.fingerprint[:12]}-{form.samples}-{form.sample_steps}.safetensors"
    return Yardstick(target, form.samples, form.sample_steps, cache=work / name)
