"""`analyze`: what a checkpoint is made of, what can go, and what each sparsity would leave."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.flow.sensitivity import measured_rises
from gfprune_cli.progress import Event, Report, silent
from gfprune_cli.pruning.command import Plan, Run
from gfprune_cli.pruning.units import find_units
from gfprune_cli.recipes.options import resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.device import choose_device, deterministic
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import COUNTED, Budget, CostModel
from gfprune_cli.structure.groups import ChannelGroup

SCHEMA_VERSION = 1
PARAMETER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PROBE_SHARE = 0.25  # of a group's channels, masked to measure its sensitivity
PROBE_DRAWS = 128


@dataclass(frozen=True)
class GroupReport:
    """One channel group. `params` and `macs` are what the removal of all its channels would save."""

    name: str
    channels: int
    unit_size: int
    params: int
    macs: int
    members: list[dict[str, str]]
    sensitivity: float | None = None


@dataclass(frozen=True)
class PlanReport:
    """What one sparsity would leave, with every unit counted as equally important."""

    sparsity: float
    achieved: float
    removed: Mapping[str, float]
    params: int
    macs: int
    bytes: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Analysis:
    """What an analysis found; `document()` is the JSON of the command."""

    model: str
    component: str
    class_name: str
    params: int
    macs: int
    bytes: int
    budget: str
    groups: list[GroupReport]
    plan: list[PlanReport]

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "analyze", **asdict(self)}


def analyze(
    model: str = "demo",
    *,
    sparsity: Sequence[float] = (),
    budget: Budget = "both",
    sensitivity: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    component: str | None = None,
    blocks: bool = False,
    prune_width: bool = False,
    prompts: str | None = None,
    size: str | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    offline: bool = False,
    device: str | None = None,
    report: Report = silent,
) -> Analysis:
    """Describe a checkpoint from its configuration and headers alone.

    Args:
        model: "demo", a local diffusers folder (its weights may be absent), or a Hub id.
        sparsity: targets in (0, 1) to plan for.
        budget: what the targets count.
        sensitivity: also measure how the loss rises when a quarter of each group, or a block, is masked;
            this loads the weights and draws calibration images.
        blocks: count whole residual blocks as groups too.
        prune_width: and the residual width of transformers.
        prompts, size, frames, guidance: of the images drawn, as in `PruneRecipe`; for `sensitivity` alone.

    Returns:
        The analysis.

    Raises:
        UsageError: a target outside (0, 1) or out of reach; GfpruneError: the checkpoint cannot be read.
    """
    for target in sparsity:
        if not 0 < target < 1:
            raise UsageError(f"--sparsity {target:g}: must lie between 0 and 1, both excluded")
    drawing = dict(prompts=prompts, size=size, frames=frames, guidance=guidance)
    for name, value in drawing.items():
        if value is not None and not sensitivity:
            raise UsageError(f"--{name} is for the images of --sensitivity: give that, or drop the flag")
    source = resolve(
        model, revision=revision, variant=variant, offline=offline, config_only=not sensitivity, report=report
    )
    found = inspect(source, component=component, variant=variant, weights_required=sensitivity)
    report(Event("trace", text=f"tracing {found.class_name}"))
    meta, groups, trace = find_units(found, report, width=prune_width, blocks=blocks)
    cost = CostModel(meta, groups, trace)
    stored = {info.dtype for info in found.tensors.values()}
    width = PARAMETER_BYTES.get(stored.pop(), 4) if len(stored) == 1 else 4
    rises: Mapping[str, float] = {}
    if sensitivity:
        if not groups:
            raise GfpruneError(f"{found.folder}: no channel group can be measured")
        recipe = resolve_recipe(
            PruneRecipe,
            None,
            dict(model=model, revision=revision, variant=variant, component=component, **drawing),
        )
        plan = Plan(found, groups, cost, None, None)
        rises = measure_sensitivity(Run(recipe, source, plan, choose_device(device), report), report)
    total = cost.params({})
    return Analysis(
        model,
        found.name,
        found.class_name,
        total,
        cost.macs({}),
        found.bytes or total * width,
        budget,
        [describe(group, cost, rises.get(group.name)) for group in groups],
        [plan_for(target, groups, cost, budget, width) for target in sparsity],
    )


def describe(group: ChannelGroup, cost: CostModel, sensitivity: float | None) -> GroupReport:
    """The costs of one group, all other groups whole."""
    whole, without = cost.removed({}), cost.removed({group.name: 0})
    members = [
        {"module": member.module, "side": member.side, "kind": member.kind} for member in group.members
    ]
    savings = {
        budget: cost.of_group(group.name, whole, budget) - cost.of_group(group.name, without, budget)
        for budget in COUNTED["both"]
    }
    return GroupReport(
        group.name, group.channels, group.unit_size, savings["params"], savings["macs"], members, sensitivity
    )


def plan_for(
    target: float, groups: tuple[ChannelGroup, ...], cost: CostModel, budget: Budget, width: int
) -> PlanReport:
    """Widths for one target in the adaptive layout, with uniform scores."""
    uniform = {group.name: torch.ones(group.units) for group in groups}
    allocation = allocate(cost, uniform, target, budget=budget)
    params, macs = cost.params(allocation.kept), cost.macs(allocation.kept)
    removed = {"params": 1 - params / cost.params({}), "macs": 1 - macs / cost.macs({})}
    return PlanReport(
        target, allocation.sparsity, removed, params, macs, params * width, dict(allocation.kept)
    )


def measure_sensitivity(run: Run, report: Report) -> dict[str, float]:
    """Group name -> relative rise of the denoising loss when its weakest quarter, or the block, is masked.

    The weakest units by first-order Taylor score go, the same number in every norm group; everything else
    stays as it is.
    """
    with deterministic():
        scored = run.scored()
    masked, draws = scored.masked, scored.draws
    baseline = run.masked_loss(draws, masked, PROBE_DRAWS)
    rises = measured_rises(
        masked, scored.scores, PROBE_SHARE, lambda: run.masked_loss(draws, masked, PROBE_DRAWS), report
    )
    return {name: rise / baseline for name, rise in rises.items()}
