"""The first part of `gpu.py`: dense training, scoring costs, gfprune beside its peers, latency and memory."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from gpu_costs import SCORING_ROWS, Meter, Timing, footprint, metered, scoring_costs, size_of
from gpu_networks import (
    as_pruned_class,
    finetune,
    pruned_by,
    read_images,
    save,
    seconds_per_sample,
    train_dense,
    write_emoji,
)
from large import Subject as Large
from report_gpu import (
    DENSE,
    PEERS,
    UNIFORM,
    Board,
    Table,
    budget_row,
    large_table,
    latency_table,
    memory_table,
    phases_table,
    quality_table,
    row,
    scoring_table,
    speed_table,
)
from study import ALL_IMAGES
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.runtime.device import default_precision

# of the time; evaluation, timing, fixed costs and other parts take the rest
DENSE_SHARE, RECOVERY_SHARE = 0.18, 0.22
FIXED = 20.0  # seconds of a method besides its gradients, and of a budget of time: reading, graph, evaluation


@dataclass(frozen=True)
class Form:
    """How much is run.

    Args:
        network: of the dense U-Net.
        images: most of each file.
        ratios: label -> share of the channels of every layer that the peers remove.
        dense_steps: at most so many.
        batch: of every training step.
        gradients: of every method, counted in samples; None for what the time allows.
        scoring: gradients that a peer's scoring may take.
        prune: settings of `gfprune prune` other than its defaults.
        cost_draws, cost_repeats: of the table of scoring costs.
        samples, sample_steps: drawn from every network.
        batches: to time.
        budgets: (runtime, batch, speed-up) of the second part, in the order in which there is time for them.
        width: of the network that they are asked of.
        large: the network of the third part.
    """

    network: dict[str, Any]
    images: int
    ratios: dict[str, float]
    dense_steps: float
    batch: int
    gradients: int | None
    scoring: int
    prune: dict[str, Any]
    cost_draws: int
    cost_repeats: int
    samples: int
    sample_steps: int
    batches: tuple[int, ...]
    budgets: tuple[tuple[str, int, float], ...]
    width: int
    large: Large

    def tables(self) -> list[Table]:
        labels = list(self.ratios)
        return [
            quality_table(labels),
            scoring_table(SCORING_ROWS),
            latency_table(labels, self.batches),
            memory_table(labels, self.batches),
            phases_table(labels),
            speed_table(
                [budget_row(*one) for one in self.budgets],
                f"a U-Net of {self.width} to {2 * self.width} channels",
            ),
            large_table(self.large.words),
        ]


@dataclass
class Clock:
    """The time that a run may take."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        return self.start + self.seconds - time.perf_counter()


@dataclass
class Run:
    """One run.

    Args:
        work: folder for checkpoints.
        failed: phases that did not end.
    """

    form: Form
    work: Path
    board: Board
    device: torch.device
    clock: Clock
    seed: int
    gradients: int = 0
    expected: float = 0.0  # seconds of one method
    failed: list[str] = field(default_factory=list)

    @cached_property
    def emoji(self) -> Any:
        return write_emoji(self.work, self.form.network["sample_size"], self.form.images)

    @cached_property
    def draws(self) -> Draws:
        return Draws(read_images(self.emoji.training, self.device), 1000, self.seed)

    @cached_property
    def dense(self) -> UNet2DModel:
        torch.manual_seed(self.seed)
        return UNet2DModel(**self.form.network)

    @cached_property
    def dense_size(self) -> dict[str, Any]:
        return size_of(self.dense)

    def folder(self, name: str) -> Path:
        return self.work / name.replace(", ", "-").replace(" ", "-").replace("%", "percent")

    @contextmanager
    def phase(self, name: str, **cells: float | None) -> Iterator[Meter]:
        """Seconds and peak memory go to the board; `cells` say more, or other things."""
        with metered(self.device) as meter:
            yield meter
        found = {"seconds": meter.seconds, "peak": meter.peak, "steps": None, "batch": None}
        self.board.put_all("phases", name, found | cells)
        print(f"{name}: {meter.seconds:.1f} s, {self.clock.left():.0f} s left", flush=True)

    @contextmanager
    def attempt(self, name: str, part: str = "quality") -> Iterator[None]:
        """What fails leaves its numbers out, and the rest is still measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.board.note(part, f"{name} failed: {said}")

    def execute(self) -> None:
        self.train()
        with self.attempt("scoring cost"), self.phase("scoring cost", peak=None):
            costs = scoring_costs(
                str(self.folder(DENSE)), self.draws, self.form.cost_draws, self.form.cost_repeats
            )
            for name, cells in costs:
                self.board.put_all("scoring", name, {"error": None} | cells)
        self.settle_gradients()
        for label, ratio in self.form.ratios.items():
            self.compare(label, ratio)
        self.measure_costs()

    def train(self) -> None:
        """The dense network, and its row."""
        form = self.form
        with self.phase("dense training", batch=form.batch):
            steps = train_dense(
                self.dense,
                self.draws.images,
                seconds=DENSE_SHARE * self.clock.seconds,
                steps=form.dense_steps,
                batch=form.batch,
                seed=self.seed,
            )
            save(self.dense, self.folder(DENSE))
        self.board.put("phases", "dense training", steps=steps)
        empty = dict.fromkeys(("ssim", "fd_teacher", "prune seconds", "finetune seconds"))
        taken = {"gradients": float(steps * form.batch)}
        self.board.put_all("quality", DENSE, {**self.shares(self.dense), **empty, **taken})

    def shares(self, network: nn.Module) -> dict[str, float]:
        size = size_of(network)
        return {f"{name} share": size[name] / self.dense_size[name] for name in ("params", "macs")}

    def settle_gradients(self) -> None:
        """As many for each method as the time allows, at the speed of a training step."""
        form, methods = self.form, len(self.form.ratios) * (1 + len(PEERS))
        with self.phase("probe", batch=form.batch):
            speed = seconds_per_sample(self.dense, self.draws, 2 if form.gradients else 5, form.batch)
        share = RECOVERY_SHARE * self.clock.seconds / methods
        self.gradients = form.gradients or max(4 * form.scoring, int(share / speed))
        self.expected = FIXED + self.gradients * speed
        self.board.note(
            "quality",
            f"{self.gradients} gradients for each method, at {1 / speed:.0f} samples per second of a step of "
            "`gfprune finetune` on the dense network",
        )

    def in_time(self, name: str) -> bool:
        if self.form.gradients or self.clock.left() > self.expected:
            return True
        said = f"{name} is left out: {self.clock.left():.0f} s are left, {self.expected:.0f} needed"
        self.board.note("quality", said)
        return False

    def compare(self, label: str, ratio: float) -> None:
        """gfprune and its peers at the parameters and MACs that `ratio` leaves the peers."""
        narrow: dict[str, tuple[nn.Module, int]] = {}
        for peer in PEERS:
            name = row(peer, label)
            with self.attempt(name), self.phase(f"prune {name}") as meter:
                narrow[peer] = pruned_by(peer, self.dense, ratio, self.draws, self.form.scoring)
                save(as_pruned_class(narrow[peer][0], self.dense), self.folder(row(UNIFORM, label)))
            self.board.put("quality", name, **{"prune seconds": meter.seconds})
        if not narrow:
            return
        shares = self.shares(next(iter(narrow.values()))[0])
        if self.in_time(row("gfprune", label)):
            with self.attempt(row("gfprune", label)):
                self.by_gfprune(label, 1 - min(shares["params share"], shares["macs share"]))
        for peer, (model, taken) in narrow.items():
            if self.in_time(row(peer, label)):
                with self.attempt(row(peer, label)):
                    self.by_peer(row(peer, label), model, taken)

    def by_gfprune(self, label: str, sparsity: float) -> None:
        """`gfprune prune` without recovery, and `gfprune finetune` for the gradients that are left."""
        form, name = self.form, row("gfprune", label)
        pruned, tuned = self.folder(f"pruned, {label}"), self.folder(name)
        common = dict(
            data=str(self.emoji.training), images=ALL_IMAGES, seed=self.seed, device=str(self.device)
        )
        settings = form.prune | {"budget": "both", "sparsity": sparsity, "recover": 0}
        with self.phase(f"prune {name}") as pruning:
            result = gfprune.prune(str(self.folder(DENSE)), out=pruned, **settings, **common)
        taken = math.ceil(result.scoring_gradients)
        steps = max(1, (self.gradients - taken) // form.batch)
        with self.phase(f"finetune {name}", steps=steps, batch=form.batch) as tuning:
            gfprune.finetune(
                str(pruned), out=tuned, steps=steps, batch=form.batch, save_every=0, sample_every=0, **common
            )
        self.evaluate(name, taken + steps * form.batch, pruning.seconds, tuning.seconds)

    def by_peer(self, name: str, model: nn.Module, taken: int) -> None:
        form = self.form
        steps = max(1, (self.gradients - taken) // form.batch)
        with self.phase(f"finetune {name}", steps=steps, batch=form.batch) as tuning:
            finetune(model, self.dense, self.draws, steps, form.batch)
            save(as_pruned_class(model, self.dense), self.folder(name))
        self.evaluate(name, taken + steps * form.batch, None, tuning.seconds)

    def evaluate(
        self, name: str, gradients: int, prune_seconds: float | None, finetune_seconds: float
    ) -> None:
        """The numbers of `gfprune eval`, against the dense network, on images that no training saw."""
        form = self.form
        with self.phase(f"eval {name}", batch=max(form.batches)):
            found = gfprune.evaluate(
                str(self.folder(name)),
                reference=str(self.folder(DENSE)),
                data=str(self.emoji.held_out),
                samples=form.samples,
                steps=form.sample_steps,
                batch=max(form.batches),
                precision=default_precision(self.device),
                seed=self.seed + 1,
                no_latency=True,
                offline=True,
                device=str(self.device),
            )
        assert found is not None
        values = {key: metric["value"] for key, metric in found.metrics.items()}
        self.board.put_all("quality", DENSE, {"loss": values["loss_reference"]})
        cells = {key: values[key] for key in ("loss", "ssim", "fd_teacher")}
        spent = {"gradients": float(gradients), "finetune seconds": finetune_seconds}
        if prune_seconds is not None:
            spent["prune seconds"] = prune_seconds
        size = self.shares(gfprune.load(self.folder(name)))
        self.board.put_all("quality", name, {**size, **cells, **spent})

    def measure_costs(self) -> None:
        """Latency and memory of the networks that are there."""
        names = next(table.rows for table in self.board.tables if table.key == "latency")
        networks = {name: gfprune.load(self.folder(name)) for name in names if self.folder(name).exists()}
        precision = default_precision(self.device)
        for name, network in networks.items():
            self.board.put_all("latency", name, {"macs share": self.shares(network)["macs share"]})
        timing = Timing(networks, self.device, precision)
        with self.attempt("latency"), self.phase("latency", peak=None):
            for batch in self.form.batches:
                found = timing.measure(batch)
                for name, ms in found.items():
                    speed_up = found[DENSE] / ms if name != DENSE and DENSE in found else None
                    self.board.put_all("latency", name, {f"{batch} ms": ms, f"{batch} speed-up": speed_up})
        with self.attempt("memory"), self.phase("memory", peak=None):
            for name, network in networks.items():
                self.board.put_all(
                    "memory", name, footprint(network, self.form.batches, self.device, precision)
                )
