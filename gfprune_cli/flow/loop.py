"""The pruning loop: score, tighten the budget, let the masks flow, refit; until every mask is 0 or 1."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from gfprune_cli.diffusion.conditions import Condition
from gfprune_cli.diffusion.draws import Batch, Draws
from gfprune_cli.diffusion.finite import NotFinite, lost_at
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import Interrupted
from gfprune_cli.flow.comparison import ROWS_PER_INPUT, comparable
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.depth import Choice, Distance, Greedy, Order
from gfprune_cli.flow.energy import Loss, Pieced, Way
from gfprune_cli.flow.mask import MaskedModel, Masks, move, settled
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.outputs.state import as_families, by_family
from gfprune_cli.progress import Event, Progress
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.runtime.half import as_stored
from gfprune_cli.runtime.processes import ALONE, Processes, agree
from gfprune_cli.structure.groups import select

FORWARD = 1 / 3  # of the cost of a gradient
REFIT_SAMPLES = 64
COMPARED_SAMPLES = 16
SCORE_CHUNK = 16  # draws whose losses are one number
# scores, share of the way to the sparsity, order of blocks -> channels kept
Allocator = Callable[[Mapping[str, torch.Tensor], float, Mapping[str, str]], Mapping[str, int]]


class Store(Protocol):
    """Where the state of a run survives a kill."""

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest durable state: (tensors, numbers); None at the first start."""

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Make a state durable."""


@dataclass(frozen=True)
class RefitResult:
    """What one refit did: losses on the draws that judge it, of the dense network as well.

    Args:
        layers: how many were fitted; 0 where the whole did not help and was taken back.
    """

    iteration: int
    dense: float
    before: float
    after: float
    layers: int


@dataclass
class LoopState:
    """Everything that a run changes beside weights and masks."""

    iteration: int = 1
    moved: bool = False  # within the iteration: what is left is the refit
    support: Masks = field(default_factory=dict)
    way: Way | None = None
    gradients: float = 0.0
    refits: list[RefitResult] = field(default_factory=list)


@dataclass
class Scoring:
    """One scoring: scores by group name [units], the same in units of the loss, and what it cost.

    Args:
        gradients: of one sample; 0 once they are counted.
        before: block -> the one of its stack that goes before it.
    """

    scores: Masks
    compared: Masks
    way: Way | None
    gradients: float
    before: Mapping[str, str] = field(default_factory=dict)


@dataclass
class PruningLoop:
    """One run over one network.

    Args:
        masked: network and masks.
        refit: fits the network to the dense one; None to leave every weight as it is.
        judge: loss of the network at its present masks, or of the dense one where told so; on images that
            nothing else sees. Its draws are `judging`.
        schedule: when what happens.
        criterion: how units are scored.
        allocate: from scores and the share of the sparsity that is due to channels kept per group.
        draws: for scoring and refit.
        scoring_draws, chunk: samples per scoring, and how many of them share a loss.
        piece: how many are in memory at once while derivatives are taken.
        turns: see `Evidence`.
        looks: positions that groups are compared at, for each input of a layer.
        refitted, compared: as many as there is memory for in a refit, and where groups are compared.
        depth: what a choice of blocks goes by, where some may go.
        fixed: the widths do not follow from scores, so that groups need not be compared.
        processes: that share the work; all end with the same masks and weights.
        drawn: iterations of flows that came before on this network, so that each has draws of its own.
        gone: group name -> bool [units] that left in those flows, and stay out.
        scored: what is known of this flow's first scoring, if it has been made.
    """

    masked: MaskedModel
    refit: Refit | None
    judge: Callable[[bool], float]
    judging: int
    process: NoisingProcess
    schedule: Schedule
    criterion: str
    allocate: Allocator
    draws: Draws
    scoring_draws: int
    chunk: int
    store: Store
    progress: Progress
    fixed: bool = False
    processes: Processes = ALONE
    depth: Choice | None = None
    piece: int = SCORE_CHUNK
    turns: int = 1
    looks: int = ROWS_PER_INPUT
    refitted: int = 1 << 30
    compared: int = 1 << 30
    drawn: int = 0
    gone: Masks = field(default_factory=dict)
    scored: Scoring | None = None
    state: LoopState = field(default_factory=LoopState)

    def run(self) -> dict[str, torch.Tensor]:
        """Run to the end, from the last durable state if there is one.

        Returns:
            group name -> bool [units], what is kept.
        """
        self.restore()
        try:
            while self.state.iteration <= self.schedule.iterations:
                self.iterate()
                self.save()
        except Interrupted as stop:
            if stop.within_step:  # masks may have moved without their iteration
                raise
            self.save()
            raise Interrupted(
                f"{stop}; the state is saved, continue with --resume", stop.signal_number
            ) from stop
        assert settled(self.masked.masks)
        return {name: mask.cpu() == 1 for name, mask in self.masked.masks.items()}

    def iterate(self) -> None:
        state, schedule = self.state, self.schedule
        if not state.moved:
            support = self.rescore() if schedule.selects(state.iteration) else state.support
            last = state.iteration == schedule.iterations
            masks = move(self.masked.masks, support, schedule.bound)
            self.masked.set_masks({name: mask.round() for name, mask in masks.items()} if last else masks)
            state.support, state.moved = support, True
            self.progress(Event("mask", state.iteration, schedule.iterations, values=self.levels()))
        refitted = None if self.refit is None else self.fit(self.refit)
        state.iteration, state.moved = state.iteration + 1, False
        if refitted is not None:  # said when it is over: a run that stops here does not fit again
            self.progress(refitted)

    def levels(self) -> dict[str, float]:
        """Share of units outside the support, and mean mask."""
        inside = torch.cat([support.flatten() for support in self.state.support.values()])
        masks = torch.cat([mask.flatten() for mask in self.masked.masks.values()])
        return {"leaving": float((~inside.bool()).float().mean()), "mask": float(masks.mean())}

    def rescore(self) -> Masks:
        """The support of this iteration's budget, from scores at the masked network.

        What changes the flow comes last: a run that stops on the way scores again.
        """
        state = self.state
        first = state.iteration == 1
        scored = self.scored if first and self.scored is not None else self.score()
        if first:
            self.scored = scored
        groups = self.masked.groups
        kept = self.allocate(scored.compared, self.schedule.share(state.iteration), scored.before)
        state.way, state.gradients = scored.way, state.gradients + scored.gradients
        scored.gradients = 0.0  # paid
        return {group.name: select(group, scored.scores[group.name], kept[group.name]) for group in groups}

    def score(self) -> Scoring:
        """Score all units, and compare the groups."""
        state = self.state
        number = self.drawn + state.iteration
        losses = scoring_losses(
            self.masked, self.process, self.draws, number, self.scoring_draws, self.chunk, self.progress,
            piece=self.piece, processes=self.processes,
        )  # fmt: skip
        evidence = Evidence(self.masked, losses, self.draws.seed, state.way, self.turns, self.processes)
        drawn = self.draws, number, self.scoring_draws, self.piece
        scores = checked_scores(self.criterion, evidence, self.process, *drawn)
        for name, units in self.gone.items():
            scores[name] = scores[name].masked_fill(units.to(scores[name].device).bool(), -math.inf)
        agree(self.progress)
        self.progress(Event("score", self.scoring_draws, self.scoring_draws))
        cost, compared = evidence.gradients * self.scoring_draws, scores
        before: Mapping[str, str] = {}
        if not self.fixed:
            x, timesteps, batch = self.noisy("compare", min(COMPARED_SAMPLES, self.compared, self.chunk))
            importance = self.process.image_weight(batch.index, FinetuneRecipe.image_weight)
            compared = comparable(
                self.masked, scores, x, timesteps, batch.condition, self.draws.seed, self.piece, self.looks,
                self.processes, importance,
            )  # fmt: skip
            cost += (1 + FORWARD) * len(batch)  # there and back, and there again
            if self.depth is not None:
                order, passes = self.blocks_in_order(self.depth, x, timesteps, batch.condition, importance)
                rises = {name: torch.tensor([rise]).double() for name, rise in order.rises.items()}
                compared, before = {**compared, **rises}, order.before
                cost += FORWARD * passes * len(batch)
        return Scoring(scores, compared, evidence.way, cost, before)

    def blocks_in_order(
        self,
        choice: Choice,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        importance: torch.Tensor,
    ) -> tuple[Order, int]:
        """Blocks as they go, each in view of those that have gone; and the passes that it took."""
        blocks = {block for stack in choice.stacks.values() for block in stack}
        gone = frozenset(name for name, units in self.gone.items() if name in blocks and bool(units.all()))
        seen = lambda: self.progress(Event("score", values={"iteration": self.state.iteration}))  # noqa: E731
        piece = min(len(x), self.compared)
        distance = Distance(self.masked, x, timesteps, condition, gone, piece, seen, importance)
        return Greedy(choice, distance, gone).order(), distance.passes

    def noisy(self, purpose: str, count: int) -> tuple[torch.Tensor, torch.Tensor, Batch]:
        """Noisy samples of this iteration, their timesteps, and what they were made of."""
        batch = self.draws.batch(purpose, self.drawn + self.state.iteration, count)
        noisy = self.process.add_noise(batch.images, batch.noise, batch.index)
        return noisy, self.process.timesteps(batch.index), batch

    def fit(self, refit: Refit) -> Event:
        """Refit, and take it back where it does not lower the loss; returns what to say of it."""
        state = self.state
        dense = state.refits[-1].dense if state.refits else self.judge(True)
        before = self.judge(False)
        x, timesteps, batch = self.noisy("refit", min(REFIT_SAMPLES, self.refitted * self.processes.count))

        def poll() -> None:
            self.progress(Event("refit", state.iteration, self.schedule.iterations))
            agree(self.progress)

        changed = refit.fit(x, timesteps, batch.condition, self.drawn + state.iteration, poll)
        layers = len({name.rpartition(".")[0] for name in changed})
        try:
            after = self.judge(False)
        except BaseException:
            refit.restore(changed)
            raise
        if not after < before:  # true for NaN as well
            refit.restore(changed)
            after, layers = before, 0
        else:
            self.processes.align(as_stored(self.masked.weights[name].detach()) for name in changed)
        judged = 2 + (not state.refits)
        state.gradients += FORWARD * (2 * len(batch) + judged * self.judging)
        state.refits.append(RefitResult(state.iteration, dense, before, after, layers))
        values = {"before": before, "after": after, "layers": float(layers)}
        return Event("refitted", state.iteration, self.schedule.iterations, values=values)

    def save(self) -> None:
        state = self.state
        weights = {name: weight.detach() for name, weight in self.masked.weights.items()}
        tensors = as_families(weight=weights, mask=self.masked.masks, support=state.support, gone=self.gone)
        numbers = {
            "iteration": state.iteration,
            "moved": state.moved,
            "way": state.way,
            "gradients": state.gradients,
            "at once": [self.piece, self.refitted, self.compared],
            "short of memory": [
                self.turns,
                self.looks,
                None if self.refit is None else self.refit.per_input,
                self.masked.recompute is not None,
            ],
            "half": self.masked.half,
            "refits": [asdict(refit) for refit in state.refits],
        }
        self.store.save(tensors, numbers)

    def restore(self) -> None:
        state = self.store.load()
        if state is None:
            return
        tensors, numbers = state
        families = by_family(tensors)
        if numbers["half"] != self.masked.half:
            self.masked.keep_in(numbers["half"])
        with torch.no_grad():
            for name, weight in self.masked.weights.items():
                weight.copy_(families["weight"][name])
        self.masked.set_masks(families["mask"])
        # other memory may be free by now, and sums of other pieces round otherwise
        self.piece, self.refitted, self.compared = numbers["at once"]
        self.turns, self.looks, per_input, recomputes = numbers["short of memory"]
        if self.refit is not None and per_input is not None:
            self.refit.per_input = per_input
        if recomputes:
            self.masked.recompute_blocks()
        self.gone = families.get("gone", {})
        self.state = LoopState(
            numbers["iteration"],
            numbers["moved"],
            families.get("support", {}),
            numbers["way"],
            numbers["gradients"],
            [RefitResult(**refit) for refit in numbers["refits"]],
        )


def scoring_losses(
    masked: MaskedModel,
    process: NoisingProcess,
    draws: Draws,
    iteration: int,
    total: int,
    chunk: int,
    progress: Progress,
    *,
    piece: int | None = None,
    processes: Processes = ALONE,
) -> list[Loss]:
    """The denoising loss over the draws of one iteration, in chunks of ascending noise.

    Chunks are as equal as they can be, and weighted so that their mean counts every draw once.

    Args:
        piece: draws that are in memory at once; None for a whole chunk.
        processes: that share the draws of each chunk; the losses are this one's part of the sums.
    """
    size = piece or chunk
    chunks = math.ceil(total / chunk)
    edges = [total * number // chunks for number in range(chunks + 1)]

    def chunk_loss(first: int, end: int) -> Loss:
        own = processes.share(end - first)
        starts, stop = range(first + own.start, first + own.stop, size), first + own.stop
        return Pieced(tuple(piece_loss(start, min(stop, start + size)) for start in starts))

    def piece_loss(first: int, end: int) -> Loss:
        count = end - first

        def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
            progress(Event("score", first + count, total, values={"iteration": iteration}))
            batch = draws.batch("score", iteration, count, first=first, of=total)
            return drawn_losses(masked, process, batch, weights).sum() * (chunks / total)

        return loss

    return [chunk_loss(first, end) for first, end in itertools.pairwise(edges)]


def drawn_losses(
    masked: MaskedModel, process: NoisingProcess, batch: Batch, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """[N] denoising loss of each draw at the given effective weights."""
    noisy = process.add_noise(batch.images, batch.noise, batch.index)
    output = masked.forward(weights, noisy, process.timesteps(batch.index), batch.condition)
    return process.losses(output, batch.images, batch.noise, batch.index)


def checked_scores(
    criterion: str,
    evidence: Evidence,
    process: NoisingProcess,
    draws: Draws,
    iteration: int,
    total: int,
    chunk: int,
) -> Masks:
    """Scores by group name [units]; where some are not finite, the losses behind them are looked at.

    Raises:
        GfpruneError: they are not finite; names the timesteps of losses that are not either.
    """
    try:
        return score(criterion, evidence)
    except NotFinite as error:
        weights, levels, losses = evidence.masked.passing(), [], []
        with torch.no_grad():
            for first in range(0, total, chunk):
                batch = draws.batch("score", iteration, min(chunk, total - first), first=first, of=total)
                levels.append(process.timesteps(batch.index))
                losses.append(drawn_losses(evidence.masked, process, batch, weights))
        bad = ~torch.cat(losses).isfinite()
        if bool(bad.any()):
            raise lost_at("the loss", bad, torch.cat(levels), "check the checkpoint and --data") from error
        raise
