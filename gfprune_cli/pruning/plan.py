"""The structure of a checkpoint, and the widths that a recipe asks for."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import absent_parts, check_pipeline
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.flow.depth import Choice
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.progress import Progress, notice
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.pruning.units import find_units
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.blocks import floor_of_stack
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import BOTH, CostModel, counted
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.native import (
    feed_forward_allocation,
    feed_forward_groups,
    narrows_streams,
    native_allocation,
)
from gfprune_cli.structure.search import BLOCKS_KEPT, TOLERANCE, Allocation
from gfprune_cli.structure.transformer import is_transformer
from gfprune_cli.timing.budget import TimeBudget, time_budget

CPU = torch.device("cpu")
FOLD = 0.01  # tolerance of folding where nothing was said


@dataclass(frozen=True)
class Plan:
    """The structure of a checkpoint and the widths a recipe asks for."""

    component: Component
    cost: CostModel
    native: Allocation | None = None
    native_config: Mapping[str, Any] | None = None
    nearest: bool = False  # the nearest reachable sparsity serves
    fold: float = 0.0  # tolerance of folding; 0 for none
    time: TimeBudget | None = None

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(self.cost.groups.values())

    def most(self, recipe: PruneRecipe) -> float:
        """How far a recipe goes: the share of the time that is to go, or else the sparsity."""
        return recipe.goal if self.time is None else self.time.gone

    def allocate(
        self, scores: Mapping[str, torch.Tensor], recipe: PruneRecipe, due: float | None = None, **how: Any
    ) -> Allocation:
        """Widths for what a recipe asks for; `how` as for `allocate` and `TimeBudget.widths`.

        Args:
            due: how far to go, if not all of `most`.

        Raises:
            UsageError: the budget is out of reach.
        """
        settings = dict(budget=recipe.budget, **how)
        if self.time is None:
            return allocate(self.cost, scores, recipe.goal if due is None else due, **settings)
        share = 1.0 if due is None else due / self.time.gone
        return self.time.widths(self.cost, scores, recipe.goal, share=share, **settings)

    def depth(self, recipe: PruneRecipe, due: float) -> Choice | None:
        """What the choice of blocks goes by, on the way to a share of the budget; None without blocks."""
        stacks = stacks_of(self.groups)
        if not stacks:
            return None
        keys, cost = counted(recipe.budget), self.cost
        ratio = BLOCKS_KEPT * math.sqrt(1 - due)

        def saved(gone: Iterable[str]) -> float:
            left = dict.fromkeys(gone, 0)
            return sum(1 - cost.total(left, key) / cost.total({}, key) for key in keys) / len(keys)

        most = {stack: len(blocks) - floor_of_stack(len(blocks), ratio) for stack, blocks in stacks.items()}
        return Choice(stacks, saved, due, most, recipe.contiguous)

    def check(self, recipe: PruneRecipe) -> Allocation:
        """Widths of the first network that a recipe asks for, where units count alike.

        Raises:
            UsageError: a budget is out of reach, unless the loss decides how far to go.
        """
        even, strict = uniform_scores(self.groups), recipe.keep_loss is None
        dues = recipe.targets if self.time is None else (None,)
        found = [self.allocate(even, recipe, due, strict=strict) for due in dues]
        return found[0]


def stacks_of(groups: tuple[ChannelGroup, ...]) -> dict[str, list[str]]:
    """Stack -> the blocks of it that may go, in the order in which they run."""
    stacks: dict[str, list[str]] = {}
    for group in groups:
        if group.is_block:
            stacks.setdefault(group.stack, []).append(group.name)
    return stacks


def sparsity_of(cost: CostModel, kept: Mapping[str, int], recipe: PruneRecipe) -> dict[str, Any]:
    """What was asked for, and the shares that went: the smallest that the budget counts, and each."""
    names = dict.fromkeys((*BOTH, *counted(recipe.budget)))
    shares = cost.gone(kept, names)
    achieved = min(shares[key] for key in counted(recipe.budget))
    return {"target": recipe.goal, "achieved": achieved, "of": recipe.budget, **shares}


def uniform_scores(groups: tuple[ChannelGroup, ...]) -> dict[str, torch.Tensor]:
    """Every unit as important as every other: what a plan is made with before anything is measured."""
    return {group.name: torch.ones(group.units) for group in groups}


def make_plan(
    source: Source,
    recipe: PruneRecipe,
    progress: Progress,
    *,
    weights_required: bool = True,
    device: torch.device = CPU,
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """Read configuration and headers, find the channel groups, check that the budget can be reached.

    Args:
        device: where networks are timed, if time is what the budget is of.
        facts: see `time_budget`.

    Raises:
        UsageError: the budget is out of reach, or the layout does not fit the checkpoint.
    """
    if recipe.keep_interfaces and (recipe.blocks or recipe.layout == "native"):
        other = "--blocks" if recipe.blocks else "--layout native"
        raise UsageError(f"--keep-interfaces keeps what {other} takes away or narrows: drop one of the two")
    component = inspect(
        source, component=recipe.component, variant=recipe.variant, weights_required=weights_required
    )
    if weights_required:
        check_pipeline(component)
        if absent := absent_parts(component):
            notice(progress, f"{component.root} has no {' and no '.join(absent)}: the output goes without")
    stages = narrows_streams(component.class_name, recipe.layout)
    meta, groups, trace = find_units(
        component,
        progress,
        width=recipe.prune_width or stages,
        stages=stages,
        blocks=recipe.blocks,
        stock=recipe.layout == "native",
        interfaces=recipe.keep_interfaces,
        options=PipelineOptions.of(recipe),
    )
    if recipe.layout == "native" and component.is_pruned:
        raise UsageError(
            "--layout native needs a checkpoint of the stock class, and this one is already pruned"
        )
    if recipe.layout == "native" and recipe.fold:
        raise UsageError("--layout native: the stock classes know no factors; drop --fold, or use adaptive")
    if not recipe.removes and recipe.fold == 0:
        raise UsageError("--sparsity 0 removes nothing: ask for more, or for --fold")
    if recipe.layout == "native" and recipe.timed:
        raise UsageError("--layout native has too few widths for a budget of time: use adaptive")
    inner = feed_forward_groups(meta, groups)
    if recipe.layout == "native" and inner and not recipe.blocks:
        return plan_feed_forward(component, CostModel(meta, inner, trace), recipe, progress)
    if recipe.layout == "native" and (recipe.blocks or not hasattr(meta.config, "block_out_channels")):
        stacks = tuple(group for group in groups if group.is_block)
        return plan_depth(component, CostModel(meta, stacks, trace), recipe, progress)
    if not groups:
        raise GfpruneError(f"{component.folder}: {component.class_name} has no channels that can be removed")
    cost = CostModel(meta, groups, trace)
    if recipe.layout == "adaptive":
        plan = Plan(component, cost)
        if recipe.timed:
            times = time_budget(recipe, meta, cost, device, progress, facts)
            if times.bench is None:
                notice(
                    progress,
                    "--times: the network is not timed, as it will run elsewhere: its speed is predicted",
                )
            plan = replace(plan, time=times.asking(speedup=recipe.speedup, latency=recipe.latency))
        found = plan.check(recipe)
        fold = tolerance_of(recipe, meta, found)
        if plan.time is not None and recipe.keep_loss is None and not (fold or facts):
            plan.time.check_reach(cost, uniform_scores(groups), progress)
        return replace(plan, fold=fold)
    allocation, config = native_allocation(meta, cost, recipe.goal, recipe.budget)
    if allocation.sparsity <= 0:
        raise UsageError(
            f"--layout native cannot shrink this {component.class_name} (its widths are tied): use adaptive"
        )
    notice(
        progress,
        f"native layout: the nearest widths of the stock class are {list(config['block_out_channels'])}, "
        f"{allocation.sparsity:.1%} of {recipe.budget} (target {recipe.goal:.1%})",
    )
    return Plan(component, cost, allocation, config)


def tolerance_of(recipe: PruneRecipe, network: nn.Module, widths: Allocation) -> float:
    """How closely modulation is to be folded.

    Where nothing was said, only transformers are, whose modulation no channel narrows, and only where
    parameters are what binds: those that a budget of MACs leaves over anyway are no gain.
    """
    if recipe.fold is not None:
        return recipe.fold
    if recipe.removes and not is_transformer(network):
        return 0.0
    shares = widths.sparsities
    binds = "params" in shares and shares["params"] - min(shares.values()) <= TOLERANCE
    return FOLD if binds or not recipe.removes else 0.0


def plan_depth(component: Component, cost: CostModel, recipe: PruneRecipe, progress: Progress) -> Plan:
    """The native layout without some blocks, and the others as wide as they were.

    Args:
        cost: of the blocks alone.

    Raises:
        UsageError: its stock class has no such key, or blocks were not asked for.
    """
    plan = Plan(component, cost, nearest=True)
    if not plan.groups:
        why = (
            "cannot leave out blocks: drop --blocks, or use adaptive"
            if recipe.blocks
            else "only knows fewer blocks: add --blocks"
        )
        raise UsageError(f"--layout native: the stock {component.class_name} {why}")
    reached = plan.allocate(uniform_scores(plan.groups), recipe, strict=False).sparsity
    if reached <= 0:
        raise UsageError(
            f"--layout native: no block of this {component.class_name} is small enough for --sparsity "
            f"{recipe.goal:g}; ask for more, or use adaptive"
        )
    notice(
        progress,
        f"native layout: whole blocks are {reached:.1%} of {recipe.budget}, target {recipe.goal:.1%}",
    )
    return plan


def plan_feed_forward(component: Component, cost: CostModel, recipe: PruneRecipe, progress: Progress) -> Plan:
    """The native layout of a transformer that has a key for the width of its feed-forward layers."""
    allocation, config = feed_forward_allocation(cost, recipe.goal, recipe.budget)
    notice(
        progress,
        f"native layout: feed-forward layers of {next(iter(config.values()))} are "
        f"{allocation.sparsity:.1%} of {recipe.budget} (target {recipe.goal:.1%})",
    )
    return Plan(component, cost, allocation, config)


def folded_plan(plan: Plan, network: nn.Module, recipe: PruneRecipe, progress: Progress) -> Plan:
    """The plan of the same budget for what the network has become by folding.

    Raises:
        UsageError: the budget is out of reach.
    """
    meta, groups, trace = find_units(
        plan.component,
        progress,
        width=recipe.prune_width,
        blocks=recipe.blocks,
        interfaces=recipe.keep_interfaces,
        folded=network,
        options=PipelineOptions.of(recipe),
    )
    plan = replace(plan, cost=CostModel(meta, groups, trace, plan.cost))
    if plan.time is not None:
        plan.time.attach(plan.cost, meta)
    if recipe.removes:
        plan.check(recipe)
    return plan


def planned_result(plan: Plan, recipe: PruneRecipe, seconds: float) -> PruneResult:
    """The numbers of a dry run: widths of the native layout, or uniform scores for the adaptive one."""
    if plan.native is not None:
        allocation = plan.native
    else:
        strict = not plan.nearest and recipe.keep_loss is None
        allocation = plan.allocate(uniform_scores(plan.groups), recipe, strict=strict)
    params = {"before": plan.cost.params({}), "after": plan.cost.params(allocation.kept)}
    before = plan.component.bytes or params["before"] * 4  # headers are not always at hand
    return PruneResult(
        model=recipe.model,
        output=None,
        component=plan.component.name,
        class_name=plan.component.class_name,
        layout=recipe.layout,
        criterion=recipe.criterion,
        seed=recipe.seed,
        sparsity=sparsity_of(plan.cost, allocation.kept, recipe),
        params=params,
        macs={"before": plan.cost.macs({}), "after": plan.cost.macs(allocation.kept)},
        bytes={"before": before, "after": round(before * params["after"] / params["before"])},
        loss=dict.fromkeys(("before", "masked", "removed", "recovered")),
        scoring_gradients=0.0,
        refit=None,
        seconds=round(seconds, 3),
        time=None if plan.time is None else plan.time.document(plan.cost, allocation.kept),
    )
