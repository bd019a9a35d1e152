"""The dense network behind masks, as it narrows from one sparsity to the next."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import one_sample
from gfprune_cli.errors import UsageError
from gfprune_cli.flow import comparison
from gfprune_cli.flow.energy import Way
from gfprune_cli.flow.layers import LEAST_ROWS
from gfprune_cli.flow.loop import (
    REFIT_SAMPLES,
    SCORE_CHUNK,
    LoopState,
    PruningLoop,
    RefitResult,
    Scoring,
    Store,
)
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import Carrier, find_residuals
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.outputs.aside import Aside
from gfprune_cli.progress import notice
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.phases import COMPARING, REFITTING, SCORING
from gfprune_cli.pruning.plan import Plan, uniform_scores
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.memory import give_back
from gfprune_cli.structure.budget import OutOfTime
from gfprune_cli.structure.removal import skeleton
from gfprune_cli.timing.budget import Scores, TimeBudget

JUDGE_DRAWS = 32  # noisy samples behind each loss that judges a refit: of those of the reported losses
Kept = dict[str, torch.Tensor]  # group name -> bool [units]


@dataclass
class Flow:
    """One network whose masks flow to one sparsity after the other; what has gone stays out.

    Args:
        several: whether it goes on after a network has been made of it.
        sparsity: where it is; of a budget of time, the share that is gone.
        drawn: iterations that it has behind it.
        gradients: spent so far, in gradients of one sample.
        refits: of the last flow.
    """

    job: PruneJob
    dense: nn.Module
    draws: Draws
    held_out: Draws
    several: bool
    sparsity: float = 0.0
    drawn: int = 0
    gradients: float = 0.0
    refits: list[RefitResult] = field(default_factory=list)

    @cached_property
    def masked(self) -> MaskedModel:
        job = self.job
        for what in self.what_gives():
            notice(job.progress, what)
        student, recomputes = self.dense, bool(job.memory.settings(SCORING).get("recomputes"))
        if job.recipe.refit or job.steps or self.several:
            student = job.twin(self.dense)
        return MaskedModel(student.requires_grad_(True), job.plan.groups, recomputes=recomputes)

    def what_gives(self) -> Iterator[str]:
        """What memory has no room for, in words; fewer samples than usual behind a refit are no rounding."""
        memory, refit = self.job.memory, self.job.recipe.refit
        samples, turns = memory.at_once(REFITTING), memory.settings(SCORING).get("turns", 0)
        if refit and samples < REFIT_SAMPLES:
            yield f"refits see {samples} samples instead of {REFIT_SAMPLES}: there is no memory for more"
        fewer = [name for name in (COMPARING, REFITTING) if "per_input" in memory.settings(name)]
        if fewer:
            yield f"{' and '.join(fewer)}: at {LEAST_ROWS:,} positions of wide layers, memory is short"
        if memory.half is not None:
            rounded = ", and refits round to it" if refit else ""
            yield f"weights are kept in {memory.half} as they are stored{rounded}: memory is short"
        if turns:
            shares = "" if turns == 1 else f", and takes gradients in {turns} turns"
            yield f"scoring computes activations twice{shares}: memory is short"

    @cached_property
    def residuals(self) -> dict[str, Carrier]:
        return find_residuals(self.dense, one_sample(self.job.process, self.draws) | in_tuples(self.dense))

    def let_go(self) -> None:
        """Forget the masked network; what was narrowed from it keeps what it needs."""
        self.__dict__.pop("masked", None)
        gc.collect()  # a network and what is hooked to it hold each other
        give_back()

    def gone(self) -> Masks:
        """Group name -> bool [units] that have left."""
        return {name: mask == 0 for name, mask in self.masked.masks.items()} if self.sparsity else {}

    def loop(self, target: float, store: Store, scored: Scoring | None = None) -> PruningLoop:
        """What brings the masks to a sparsity.

        Args:
            scored: the scoring of its first iteration, where it is known.
        """
        job, recipe, masked = self.job, self.job.recipe, self.masked
        looks = job.memory.settings(REFITTING)
        refit = None
        if recipe.refit:
            refit = Refit(masked, self.dense, self.residuals, recipe.seed, processes=job.processes, **looks)
            if job.offload_teacher and job.new_folder is not None:
                refit.aside = partial(Aside, job.new_folder())
        settings = job.memory.settings(SCORING)
        way: Way | None = None if settings.get("exact") else "finite-difference"
        loop = PruningLoop(
            masked=masked,
            refit=refit,
            judge=lambda of_dense: self.quick_loss(self.dense if of_dense else masked),
            judging=JUDGE_DRAWS,
            process=job.process,
            schedule=schedule_of(recipe),
            criterion=recipe.criterion,
            allocate=lambda scores, share, before: self.widths(scores, share, before, target, loop.gone),
            draws=self.draws,
            scoring_draws=recipe.draws,
            chunk=SCORE_CHUNK,
            piece=job.memory.at_once(SCORING),
            turns=settings.get("turns", 1),
            looks=job.memory.settings(COMPARING).get("per_input", comparison.ROWS_PER_INPUT),
            refitted=job.memory.at_once(REFITTING),
            compared=job.memory.at_once(COMPARING),
            drawn=self.drawn,
            gone=self.gone(),
            scored=scored,
            state=LoopState(way=way, gradients=self.gradients),
            store=store,
            progress=job.progress,
            fixed=job.plan.native is not None,
            processes=job.processes,
            depth=job.plan.depth(recipe, target),
        )
        return loop

    def widths(
        self, scores: Scores, share: float, before: Mapping[str, str], target: float, gone: Masks
    ) -> Mapping[str, int]:
        """Channels that each group keeps.

        Args:
            share: of the way from where the flow is to the target.
            before: block -> the one of its stack that goes before it.
            gone: units that had left before it.
        """
        plan, recipe = self.job.plan, self.job.recipe
        if plan.native is not None:
            return native_widths(plan, share)
        due = self.sparsity + (target - self.sparsity) * share
        final = share >= 1 and not plan.nearest
        how: dict[str, Any] = {
            "start": {
                group.name: group.channels - int(gone[group.name].sum()) * group.unit_size
                for group in plan.groups
                if group.name in gone
            },
            "before": before,
        }

        def narrowed(left: float | None = None) -> Mapping[str, int]:
            if left is not None:
                how["left"] = left
            try:
                return plan.allocate(scores, recipe, due, align=recipe.align, strict=final, **how).kept
            except UsageError:  # these scores end short of it; equal ones did not, when it was planned
                return plan.allocate(uniform_scores(plan.groups), recipe, due, strict=not gone, **how).kept

        if plan.time is None or plan.time.bench is None or not final or due < plan.most(recipe):
            return narrowed()
        return self.in_time(plan.time, narrowed)

    def in_time(self, time: TimeBudget, widths: Callable[[float], Mapping[str, int]]) -> Mapping[str, int]:
        """Widths whose time was measured."""

        def propose(left: float) -> Mapping[str, int] | None:
            try:
                return widths(left)
            except OutOfTime as error:
                return error.nearest.kept
            except UsageError:  # the best of what was timed before stands
                return None

        folded = None if self.job.folding is None else skeleton(self.dense)
        return time.closed(self.job.plan.cost, propose, self.job.progress, folded)

    def quick_loss(self, network: nn.Module | MaskedModel) -> float:
        """The loss that judges a refit."""
        return self.job.loss(self.held_out, network, JUDGE_DRAWS)

    @property
    def iterations(self) -> int:
        """Of each flow from one sparsity to the next."""
        return schedule_of(self.job.recipe).iterations

    def losses(self, network: nn.Module | MaskedModel) -> torch.Tensor:
        """[draws] float64 losses on images that nothing else sees, as they are reported."""
        return self.job.losses(self.held_out, network)

    def run(self, loop: PruningLoop, target: float) -> Kept:
        """Let the masks flow to the end of a loop, from its last durable state if there is one."""
        kept = loop.run()
        self.sparsity, self.drawn = target, self.drawn + loop.schedule.iterations
        self.gradients, self.refits = loop.state.gradients, loop.state.refits
        return kept


def schedule_of(recipe: PruneRecipe) -> Schedule:
    if recipe.one_shot:
        return Schedule(scorings=1, bound=1)
    return Schedule(scorings=recipe.iterations, bound=recipe.bound)


def native_widths(plan: Plan, share: float) -> Mapping[str, int]:
    """Channels kept by each group on the way to the widths of the native layout."""
    assert plan.native is not None
    kept = {}
    for group in plan.groups:
        goal = plan.native.kept[group.name]
        units = round((group.channels - (group.channels - goal) * share) / group.unit_size)
        kept[group.name] = max(goal, units * group.unit_size)
    return kept
