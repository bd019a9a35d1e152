"""`prune`: from a checkpoint to a smaller one, end to end."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.durable import check_destination, is_output, refuse_overlaps
from gfprune_cli.checkpoint.locks import claimed
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.state import StateFolder, finished_record, not_finished, run_digest
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.data.cache import sweep_caches
from gfprune_cli.device import choose_device, deterministic
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import Event, PhaseClock, Report, notice, silent
from gfprune_cli.pruning.plan import Plan, make_plan, planned
from gfprune_cli.pruning.record import make_record
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.pruning.run import Run
from gfprune_cli.recipes.prune import PruneRecipe

__all__ = ["Plan", "PruneResult", "Run", "make_plan", "prune"]


def default_output(recipe: PruneRecipe) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    if not recipe.sparsity:
        return Path(f"{stem}-fold")
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
        resume: go on from the state of an interrupted run, if there is one; nothing to do if it finished.
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
    check = partial(check_destination, destination, force=force, resume=resume)
    with nullcontext() if dry_run else claimed(destination, check):
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
        inputs = {"--model": source.folder, "--data": recipe.data, "--prompts": recipe.prompts}
        refuse_overlaps(destination, inputs)
        run = Run(recipe, source, plan, chosen, report, offload_teacher=offload_teacher)
        state = StateFolder(destination, run.identity())
        if resume and not force and is_output(destination):
            record = finished_run(run, destination)
            if not state.foreign():  # killed after the output was published
                state.end()
            return result_of(recipe, destination, record, start, clock)
        if force and not resume:
            state.clear()
        if state.exists() and not resume:
            raise UsageError(
                f"an interrupted run left its state in {state.folder}: "
                "continue it with --resume, or discard it with --force"
            )
        with deterministic():
            model, outcome = run.execute(state)
        record = make_record(run, model, outcome)
        report(Event("write", text=f"writing {destination}"))
        record = write_checkpoint(destination, model, plan.component, record, force=force)
        state.end()
    return result_of(recipe, destination, record, start, clock)


def finished_run(run: Run, destination: Path) -> dict[str, Any]:
    """The record of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(run.identity()))
    if record is None:
        raise not_finished(destination)
    if record["source"]["data"] is not None:  # the digest is of the settings, not of what --data holds
        run.draws(run.load())
        if record["source"]["data"] != run.data_fingerprint:
            raise not_finished(destination)
    sweep_caches()
    notice(run.report, f"{destination} is finished: there is nothing left to do")
    return record


def result_of(
    recipe: PruneRecipe, destination: Path, record: Mapping[str, Any], start: float, clock: PhaseClock
) -> PruneResult:
    """The numbers of a finished run; `start` and `clock` are this one's."""
    return PruneResult(
        recipe.model,
        str(destination),
        record["component"],
        record["class_name"],
        recipe.layout,
        recipe.criterion,
        recipe.seed,
        record["sparsity"],
        record["params"],
        record["macs"],
        record["bytes"],
        record["loss"],
        record["scoring_gradients"],
        record["refit"],
        round(time.monotonic() - start, 3),
        clock.finish(),
        record.get("fold"),
    )
