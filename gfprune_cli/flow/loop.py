"""The pruning loop: score, tighten the budget, let the masks flow, train; until every mask is 0 or 1."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from gfprune_cli.data.diffusion import NoisingProcess
from gfprune_cli.data.draws import Draws
from gfprune_cli.errors import Interrupted
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.energy import Loss, Way
from gfprune_cli.flow.mask import MaskedModel, Masks, move, settled
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.flow.sensitivity import DRAWS, SHARE, comparable, measured_rises
from gfprune_cli.flow.training import Trainer
from gfprune_cli.progress import Event, Report, silent
from gfprune_cli.recipes.prune import CriterionName
from gfprune_cli.structure.groups import ChannelGroup, select

MOMENTUM = 0.5  # of the scores from one iteration to the next
Allocator = Callable[
    [Mapping[str, torch.Tensor], float], Mapping[str, int]
]  # scores, progress -> channels kept


class Store(Protocol):
    """Where the state of a run survives a kill."""

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest durable state: (tensors, numbers); None at the first start."""

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Make a state durable."""


@dataclass
class Flow:
    """Everything that a run changes: iteration and step within it, scores, selection and speeds."""

    iteration: int = 1
    step: int = 0
    scores: Masks = field(default_factory=dict)
    support: Masks = field(default_factory=dict)
    speed: Masks = field(default_factory=dict)
    way: Way | None = None
    rises: dict[str, float] = field(default_factory=dict)
    gradients: float = 0.0
    loss: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class PruningLoop:
    """One run over one network.

    Args:
        masked: network and masks.
        trainer: trains it between mask steps; shares the network.
        schedule: when what happens.
        criterion: how units are scored.
        allocate: from scores and the sparsity wanted now to channels kept per group.
        draws: for scoring.
        scoring_draws, chunk: samples per scoring, and how many of them are in memory at once.
        measured: groups are compared by measured losses (`flow.sensitivity`), not by their scores.
    """

    masked: MaskedModel
    trainer: Trainer
    process: NoisingProcess
    schedule: Schedule
    criterion: CriterionName
    allocate: Allocator
    draws: Draws
    scoring_draws: int
    chunk: int
    store: Store
    report: Report
    measured: bool = False
    flow: Flow = field(default_factory=Flow)

    def run(self) -> dict[str, torch.Tensor]:
        """Run to the end, from the last durable state if there is one.

        Returns:
            group name -> bool [units], what is kept.
        """
        self.restore()
        try:
            while self.flow.iteration <= self.schedule.iterations:
                self.iterate()
                self.save()
        except Interrupted as stop:
            if stop.within_step:  # masks may have moved without their step, weights without their moments
                raise
            self.save()
            raise Interrupted(
                f"{stop}; the state is saved, continue with --resume", stop.signal_number
            ) from stop
        assert settled(self.masked.masks)
        return {name: mask.cpu() == 1 for name, mask in self.masked.masks.items()}

    def iterate(self) -> None:
        flow, schedule = self.flow, self.schedule
        if flow.step == 0:
            if schedule.scores(flow.iteration):
                self.rescore()
            self.reselect()
        moves = max(1, schedule.steps_per_iteration)
        while flow.step < moves:
            self.masked.set_masks(move(self.masked.masks, flow.support, flow.speed, schedule.pace / moves))
            if flow.step == moves - 1:
                self.snap()
            if schedule.steps_per_iteration:
                flow.loss = self.train()
            flow.step += 1
            done = (flow.iteration - 1) * moves + flow.step
            trained = {"loss": flow.loss} if schedule.steps_per_iteration else {}
            phase = "train" if trained else "mask"
            self.report(Event(phase, done, schedule.iterations * moves, values=trained | self.levels()))
        flow.history.append({"iteration": flow.iteration, "loss": flow.loss} | self.levels())
        flow.iteration, flow.step = flow.iteration + 1, 0

    def train(self) -> float:
        step = (self.flow.iteration - 1) * self.schedule.steps_per_iteration + self.flow.step
        return self.trainer.step(step)

    def snap(self) -> None:
        """At the end of the run, absorb the rounding of many small mask steps."""
        if self.flow.iteration == self.schedule.iterations:
            near = {
                name: (mask.round() - mask).abs().max() < 1e-4 for name, mask in self.masked.masks.items()
            }
            assert all(near.values()), "the schedule closes before the masks do"
            self.masked.set_masks({name: mask.round() for name, mask in self.masked.masks.items()})

    def levels(self) -> dict[str, float]:
        """Share of units outside the support, and mean mask."""
        inside = torch.cat([support.flatten() for support in self.flow.support.values()])
        masks = torch.cat([mask.flatten() for mask in self.masked.masks.values()])
        return {"leaving": float((~inside.bool()).float().mean()), "mask": float(masks.mean())}

    def rescore(self) -> None:
        """Score at the masked network, with momentum over iterations.

        What changes the flow comes last: a run that stops on the way scores again.
        """
        flow = self.flow
        losses = scoring_losses(
            self.masked, self.process, self.draws, flow.iteration, self.scoring_draws, self.chunk, self.report
        )
        evidence = Evidence(self.masked, losses, self.draws.seed, flow.way)
        fresh = score(self.criterion, evidence)
        self.report(Event("score", self.scoring_draws, self.scoring_draws))
        measure = self.measured and not flow.rises
        rises, cost = self.measure(fresh) if measure else (flow.rises, 0.0)
        flow.scores = {
            name: MOMENTUM * flow.scores[name] + (1 - MOMENTUM) * value if flow.scores else value
            for name, value in fresh.items()
        }
        flow.way, flow.rises = evidence.way, rises
        flow.gradients += evidence.gradients + cost

    def measure(self, scores: Masks) -> tuple[dict[str, float], float]:
        """Once, at the dense network: rises of the loss by group, and their cost in gradients."""
        count = min(DRAWS, self.scoring_draws)
        losses = scoring_losses(self.masked, self.process, self.draws, 0, count, self.chunk, silent)

        @torch.no_grad()
        def loss() -> float:
            weights = {name: tensor.detach() for name, tensor in self.masked.effective().items()}
            return torch.stack([part(weights) for part in losses]).mean().item()

        rises = measured_rises(self.masked, scores, SHARE, loss, self.report)
        forward = 1 / 3  # of the cost of a gradient
        return rises, forward * (len(rises) + 1) * count / self.scoring_draws

    def reselect(self) -> None:
        """The support of this iteration's budget, and how fast units leave it."""
        flow, groups = self.flow, self.masked.groups
        if self.schedule.selects(flow.iteration):
            scores = comparable(groups, flow.scores, flow.rises) if flow.rises else flow.scores
            kept = self.allocate(scores, self.schedule.target(flow.iteration) / self.schedule.sparsity)
            flow.support = {
                group.name: select(group, flow.scores[group.name], kept[group.name]) for group in groups
            }
            flow.speed = {group.name: leaving_rank(group, flow.scores[group.name]) for group in groups}
        if not self.schedule.selects(flow.iteration) or not self.schedule.closing:
            flow.speed = {name: torch.ones_like(speed) for name, speed in flow.speed.items()}

    def save(self) -> None:
        flow, adam = self.flow, self.trainer.adam
        tensors: dict[str, torch.Tensor] = {}
        families: dict[str, Mapping[str, torch.Tensor]] = {
            "weight": self.masked.weights,
            "mask": self.masked.masks,
            "first": adam.first,
            "second": adam.second,
            "score": flow.scores,
            "support": flow.support,
            "speed": flow.speed,
        }
        for family, members in families.items():
            tensors |= {f"{family}/{name}": tensor.detach() for name, tensor in members.items()}
        numbers = {
            "iteration": flow.iteration,
            "step": flow.step,
            "adam_steps": adam.steps,
            "way": flow.way,
            "rises": flow.rises,
            "gradients": flow.gradients,
            "loss": flow.loss,
            "micro_batch": self.trainer.micro_batch,
            "history": flow.history,
        }
        self.store.save(tensors, numbers)

    def restore(self) -> None:
        state = self.store.load()
        if state is None:
            return
        tensors, numbers = state
        families: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            family, _, name = key.partition("/")
            families.setdefault(family, {})[name] = tensor
        with torch.no_grad():
            for name, weight in self.masked.weights.items():
                weight.copy_(families["weight"][name])
        self.masked.set_masks(families["mask"])
        adam = self.trainer.adam
        adam.first = self.like_weights(families.get("first", {}))
        adam.second = self.like_weights(families.get("second", {}))
        adam.steps, self.trainer.micro_batch = numbers["adam_steps"], numbers["micro_batch"]
        self.flow = Flow(
            numbers["iteration"],
            numbers["step"],
            families.get("score", {}),
            families.get("support", {}),
            families.get("speed", {}),
            numbers["way"],
            numbers.get("rises", {}),
            numbers["gradients"],
            numbers["loss"],
            numbers["history"],
        )

    def like_weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Saved moments on the device and in the memory format of their weights: kernels depend on both."""
        weights = self.masked.weights
        return {name: torch.empty_like(weights[name]).copy_(tensor) for name, tensor in tensors.items()}


def scoring_losses(
    masked: MaskedModel,
    process: NoisingProcess,
    draws: Draws,
    iteration: int,
    total: int,
    chunk: int,
    report: Report,
) -> list[Loss]:
    """The denoising loss over the draws of one iteration, in chunks of ascending noise.

    Chunks are as equal as they can be, and weighted so that their mean counts every draw once.
    """
    chunks = math.ceil(total / chunk)
    edges = [total * number // chunks for number in range(chunks + 1)]

    def chunk_loss(first: int, end: int) -> Loss:
        count = end - first

        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            report(Event("score", first + count, total, values={"iteration": iteration}))
            batch = draws.batch("score", iteration, count, first=first, of=total)
            noisy = process.add_noise(batch.images, batch.noise, batch.index)
            output = masked.forward(weights, noisy, process.timesteps(batch.index), batch.condition)
            losses = process.losses(output, batch.images, batch.noise, batch.index)
            return losses.sum() * (chunks / total)

        return loss

    return [chunk_loss(first, end) for first, end in itertools.pairwise(edges)]


def leaving_rank(group: ChannelGroup, scores: torch.Tensor) -> torch.Tensor:
    """[units] in [0, 1]: 1 for the unit with the lowest score, the one that the flow pushes out hardest."""
    order = torch.sort(scores, stable=True).indices
    rank = torch.empty(group.units, dtype=torch.float64)
    rank[order] = (
        torch.linspace(1, 0, group.units, dtype=torch.float64) if group.units > 1 else torch.ones(1).double()
    )
    return rank
