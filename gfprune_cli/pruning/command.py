"""`prune`: from a checkpoint to a smaller one, end to end."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.record import finished_record
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.outputs.cache import sweep_caches
from gfprune_cli.outputs.claim import claim
from gfprune_cli.outputs.state import not_finished, run_digest
from gfprune_cli.progress import Event, PhaseClock, Progress, notice, silent
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.plan import make_plan, planned_result
from gfprune_cli.pruning.record import make_record
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.device import choose_device, deterministic
from gfprune_cli.runtime.launch import check_alone


def default_output(recipe: PruneRecipe) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    if not recipe.removes:
        return Path(f"{stem}-fold")
    asked = {"speedup": recipe.speedup, "latency": recipe.latency}
    parts = [stem, recipe.criterion]
    parts += [f"{recipe.budget}{round(recipe.sparsity * 100)}"] if recipe.sparsity else []
    parts += [f"{name}{value:g}" for name, value in asked.items() if value is not None]
    return Path("-".join(parts + (["native"] if recipe.layout == "native" else [])))


def prune(recipe: PruneRecipe, options: RunOptions, progress: Progress = silent) -> PruneResult:
    """Prune a checkpoint and write the result; what is told to `recipe` decides its bytes.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `progress`; the state is durable by then.
    """
    start = time.monotonic()
    check_alone("prune")
    progress = clock = PhaseClock(progress)
    destination = options.out or default_output(recipe)
    device = choose_device(options.device)
    with claim(destination, options) as output:
        source = resolve(
            recipe.model,
            revision=recipe.revision,
            variant=recipe.variant,
            config_from=recipe.config_from,
            offline=options.offline,
            config_only=options.dry_run,
            progress=progress,
        )
        plan = make_plan(
            source,
            recipe,
            progress,
            weights_required=not options.dry_run or source.kind != "hub",
            device=device,
            facts=output.state({}).found() if options.resume else {},
        )
        output.refuse_inputs({"--model": source.folder, "--data": recipe.data, "--prompts": recipe.prompts})
        job = PruneJob(recipe, source, plan, device, progress, offload_teacher=options.offload_teacher)
        if options.dry_run:
            output.refuse_state()
            if plan.fold:
                notice(
                    progress, f"--fold {plan.fold:g} is not in these numbers: ranks follow from the weights"
                )
            return planned_result(plan, recipe, time.monotonic() - start)
        state = output.state(job.identity())
        if output.finished:
            record = finished_run(job, destination)
            if not state.foreign():  # killed after the output was published
                state.end()
        else:
            output.prepare(state)
            state.facts = {} if plan.time is None else plan.time.facts()
            with deterministic():
                model, outcome = job.execute(state)
            progress(Event("write", text=f"writing {destination}"))
            record = make_record(job, model, outcome)
            record = write_checkpoint(destination, model, plan.component, record, force=options.force)
            state.end()
    return result_of(recipe, destination, record, start, clock)


def finished_run(job: PruneJob, destination: Path) -> dict[str, Any]:
    """The record of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(job.identity()))
    if record is None:
        raise not_finished(destination)
    if record["source"]["data"] is not None:  # the digest is of the settings, not of what --data holds
        job.draws(job.load())
        if record["source"]["data"] != job.data_fingerprint:
            raise not_finished(destination)
    sweep_caches()
    notice(job.progress, f"{destination} is finished: there is nothing left to do")
    return record


def result_of(
    recipe: PruneRecipe, destination: Path, record: Mapping[str, Any], start: float, clock: PhaseClock
) -> PruneResult:
    """The numbers of a finished run; `start` and `clock` are this one's."""
    shared = (
        "component", "class_name", "sparsity", "params", "macs", "bytes", "loss", "scoring_gradients", "refit"
    )  # fmt: skip
    return PruneResult(
        model=recipe.model,
        output=str(destination),
        layout=recipe.layout,
        criterion=recipe.criterion,
        seed=recipe.seed,
        seconds=round(time.monotonic() - start, 3),
        seconds_by_phase=clock.finish(),
        fold=record.get("fold"),
        time=record.get("time"),
        **{name: record[name] for name in shared},
    )
