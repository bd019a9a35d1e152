"""`prune`: from a checkpoint to a smaller one, end to end."""

import time
from pathlib import Path

from gfprune_cli.checkpoint.durable import StateFolder, check_destination, recover
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.device import choose_device, deterministic
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import Event, PhaseClock, Report, silent
from gfprune_cli.pruning.align import settle_align
from gfprune_cli.pruning.plan import Plan, make_plan, planned
from gfprune_cli.pruning.record import make_record
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.pruning.run import Run
from gfprune_cli.recipes.prune import PruneRecipe

__all__ = ["Plan", "PruneResult", "Run", "make_plan", "prune"]


def default_output(recipe: PruneRecipe) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    parts = [stem, recipe.criterion, f"{recipe.budget}{round(recipe.sparsity * 100)}"]
    return Path("-".join(parts + (["native"] if recipe.layout == "native" else [])))


def prune(
    recipe: PruneRecipe,
    *,
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    device: str | None = None,
    offload_teacher: bool = False,
    report: Report = silent,
) -> PruneResult:
    """Prune a checkpoint and write the result.

    Args:
        recipe: what to do; decides the bytes of the output.
        out: destination folder; by default named after the model and the settings.
        force: replace a destination that is not empty, and discard the state of an interrupted run.
        resume: go on from the state of an interrupted run, if there is one.
        dry_run: plan only; nothing is written and no weights are read.
        offline: never use the network.
        device: torch device; by default CUDA if there is one.
        offload_teacher: keep the dense network in main memory while training on another device.

    Returns:
        The numbers before and after.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `report`; the state is durable by then.
    """
    start = time.monotonic()
    report = clock = PhaseClock(report)
    destination = Path(out).expanduser() if out is not None else default_output(recipe)
    chosen = choose_device(device)
    if not dry_run:
        recover(destination)
        check_destination(destination, force=force)
    source = resolve(
        recipe.model,
        revision=recipe.revision,
        variant=recipe.variant,
        offline=offline,
        config_only=dry_run,
        report=report,
    )
    plan = make_plan(source, recipe, report, weights_required=not dry_run or source.kind != "hub")
    if dry_run:
        return planned(plan, recipe, time.monotonic() - start)
    given = {"--data": recipe.data, "--prompts": recipe.prompts}
    inputs = {"--model": source.folder} | {name: Path(value) for name, value in given.items() if value}
    for name, used in inputs.items():
        if used.resolve().is_relative_to(destination.resolve()):
            raise UsageError(f"--out {destination} would replace {name} {used}: name another folder")
    recipe = settle_align(recipe, plan, chosen, destination, report, resume=resume)
    run = Run(recipe, source, plan, chosen, report, offload_teacher=offload_teacher)
    state = StateFolder(destination, run.identity())
    if force and not resume:
        state.clear()
    if state.exists() and not resume:
        raise UsageError(
            f"an interrupted run left its state in {state.folder}: "
            "continue it with --resume, or discard it with --force"
        )
    with deterministic():
        model, kept, losses, gradients = run.execute(state)
    record = make_record(run, model, kept, losses)
    report(Event("write", text=f"writing {destination}"))
    record = write_checkpoint(destination, model, plan.component, record, force=force)
    state.clear()
    return PruneResult(
        recipe.model,
        str(destination),
        plan.component.name,
        type(model).__name__,
        recipe.layout,
        recipe.criterion,
        recipe.seed,
        record["sparsity"],
        record["params"],
        record["macs"],
        record["bytes"],
        record["loss"],
        round(gradients, 2),
        round(time.monotonic() - start, 3),
        clock.finish(),
    )
