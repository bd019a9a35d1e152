"""`analyze`: what a checkpoint is made of, what can go, and what each sparsity would leave."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gfprune_cli.checkpoint.layout import denoiser_names, stock_name
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.record import SCHEMA_VERSION
from gfprune_cli.checkpoint.source import source_of
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.families.table import is_known_class
from gfprune_cli.flow.sensitivity import measured_rises
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.progress import Event, Progress, silent
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.plan import Plan, uniform_scores
from gfprune_cli.pruning.units import find_units
from gfprune_cli.recipes.analyze import AnalyzeRecipe
from gfprune_cli.recipes.options import ALL
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.recipes.timing import check_time_options
from gfprune_cli.runtime.device import choose_device, deterministic
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import BOTH, CostModel
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.timing.budget import time_budget
from gfprune_cli.timing.report import SpeedupReport, left_by, speedup_report, time_report
from gfprune_cli.timing.table import check_table_file, write_table

PARAMETER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PROBE_SHARE = 0.25  # of a group's channels, masked to measure its sensitivity
PROBE_DRAWS = 128


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One channel group. `params` and `macs` are what the removal of all its channels would save."""

    name: str
    channels: int
    unit_size: int
    params: int
    macs: int
    members: list[dict[str, str]]
    sensitivity: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What one sparsity would leave, with every unit counted as equally important."""

    sparsity: float
    achieved: float
    removed: Mapping[str, float]
    params: int
    macs: int
    bytes: int
    kept: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
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
    time: Mapping[str, Any] | None
    speedups: list[SpeedupReport]

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "analyze", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Analyses:
    """What was found of every denoiser of a pipeline."""

    networks: tuple[Analysis, ...]

    def document(self) -> dict[str, Any]:
        found = [asdict(network) for network in self.networks]
        return {"schema_version": SCHEMA_VERSION, "command": "analyze", "networks": found}


def analyze(recipe: AnalyzeRecipe, options: RunOptions, progress: Progress = silent) -> Analysis | Analyses:
    """Describe a checkpoint: one of its networks, or every denoiser.

    Raises:
        UsageError: a target out of reach; GfpruneError: the checkpoint cannot be read.
    """
    if recipe.component != ALL:
        return analyze_one(recipe, options, progress)
    if recipe.times is not None or options.times_out is not None:
        raise UsageError("--times and --times-out hold the layers of one network: name its --component")
    source = source_of(recipe, options, progress, config_only=not recipe.sensitivity)
    each = [replace(recipe, component=name) for name in denoiser_names(source.folder)]
    return Analyses(networks=tuple(analyze_one(one, options, progress) for one in each))


def analyze_one(recipe: AnalyzeRecipe, options: RunOptions, progress: Progress) -> Analysis:
    """Describe a checkpoint, from its configuration and headers alone unless `sensitivity` is asked for.

    Where time is asked for, a network of the same structure is timed.

    Raises:
        UsageError: a target out of reach; GfpruneError: the checkpoint cannot be read.
    """
    timed = bool(recipe.speedup or recipe.times or options.times_out)
    check_time_options(recipe, timed, "--speedup or --times-out")
    if options.times_out is not None:
        if recipe.times is not None:
            raise UsageError("--times-out has no effect with --times: drop one of the two")
        check_table_file(options.times_out, force=options.force)
    drawing = {name: getattr(recipe, name) for name in ("prompts", "size", "frames", "guidance")}
    source = source_of(recipe, options, progress, config_only=not recipe.sensitivity)
    found = inspect(
        source, component=recipe.component, variant=recipe.variant, weights_required=recipe.sensitivity
    )
    for name, value in drawing.items():
        if value is not None and not recipe.sensitivity and is_known_class(stock_name(found.class_name)):
            raise UsageError(f"--{name} is for the images of --sensitivity: give that, or drop the flag")
    progress(Event("trace", text=f"tracing {found.class_name}"))
    meta, groups, trace = find_units(
        found,
        progress,
        width=recipe.prune_width,
        blocks=recipe.blocks,
        options=PipelineOptions.of(recipe),
    )
    cost = CostModel(meta, groups, trace)
    stored = {info.dtype for info in found.tensors.values()}
    width = PARAMETER_BYTES.get(stored.pop(), 4) if len(stored) == 1 else 4
    rises: Mapping[str, float] = {}
    if recipe.sensitivity:
        if not groups:
            raise GfpruneError(f"{found.folder}: no channel group can be measured")
        shared = {
            name: getattr(recipe, name)
            for name in ("model", "revision", "variant", "config_from", "component")
        }
        job_recipe, device = PruneRecipe(**shared, **drawing), choose_device(options.device)
        rises = measure_sensitivity(PruneJob(job_recipe, source, Plan(found, cost), device, progress))
    time, speedups = None, []
    if timed:
        budget = time_budget(recipe, meta, cost, choose_device(options.device), progress)
        if options.times_out is not None:
            write_table(options.times_out, budget.table)
        time = time_report(budget, cost)
        uniform = uniform_scores(groups)
        speedups = [speedup_report(target, budget, cost, uniform, width) for target in recipe.speedup]
    total = cost.params({})
    return Analysis(
        model=recipe.model,
        component=found.name,
        class_name=found.class_name,
        params=total,
        macs=cost.macs({}),
        bytes=found.bytes or total * width,
        budget=recipe.budget,
        groups=[describe(group, cost, rises.get(group.name)) for group in groups],
        plan=[plan_for(target, groups, cost, recipe.budget, width) for target in recipe.sparsity],
        time=time,
        speedups=speedups,
    )


def describe(group: ChannelGroup, cost: CostModel, sensitivity: float | None) -> GroupReport:
    """The costs of one group, all other groups whole."""
    whole, without = cost.removed({}), cost.removed({group.name: 0})
    members = [
        {"module": member.module, "side": member.side, "kind": member.kind} for member in group.members
    ]
    savings = {
        budget: cost.of_group(group.name, whole, budget) - cost.of_group(group.name, without, budget)
        for budget in BOTH
    }
    return GroupReport(
        name=group.name,
        channels=group.channels,
        unit_size=group.unit_size,
        params=savings["params"],
        macs=savings["macs"],
        members=members,
        sensitivity=sensitivity,
    )


def plan_for(
    target: float, groups: tuple[ChannelGroup, ...], cost: CostModel, budget: str, width: int
) -> PlanReport:
    """Widths for one target in the adaptive layout, with uniform scores."""
    allocation = allocate(cost, uniform_scores(groups), target, budget=budget)
    return PlanReport(
        sparsity=target,
        achieved=allocation.sparsity,
        **left_by(cost, allocation.kept, width),
    )


def measure_sensitivity(job: PruneJob) -> dict[str, float]:
    """Group name -> relative rise of the denoising loss when its weakest quarter, or the block, is masked.

    The weakest units by first-order Taylor score go, the same number in every norm group; everything else
    stays as it is.
    """
    with deterministic():
        masked, draws, scores = job.scored()

    def loss() -> float:
        return job.loss(draws, masked, PROBE_DRAWS)

    baseline = loss()
    rises = measured_rises(masked, scores, PROBE_SHARE, loss, job.progress)
    return {name: rise / baseline for name, rise in rises.items()}
