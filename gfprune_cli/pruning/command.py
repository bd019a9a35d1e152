"""`prune`: from a checkpoint to a smaller one, end to end."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.layout import denoiser_names
from gfprune_cli.checkpoint.record import joined
from gfprune_cli.checkpoint.source import source_of
from gfprune_cli.checkpoint.writer import write_joined
from gfprune_cli.errors import UsageError
from gfprune_cli.outputs.claim import Claim, claim
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import Event, PhaseClock, Progress, notice, silent
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.plan import make_plan
from gfprune_cli.pruning.result import PruneResult, PruneResults
from gfprune_cli.pruning.writing import finished_run, make_networks, planned, result_of
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.options import ALL
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.device import choose_device
from gfprune_cli.runtime.launch import check_alone, unused_settings
from gfprune_cli.runtime.processes import Processes, Together


def default_output(recipe: PruneRecipe, sparsity: float) -> Path:
    """A name derived from the model and the settings."""
    stem = Path(recipe.model).name or "model"
    if not recipe.removes:
        return Path(f"{stem}-fold")
    parts = [stem, recipe.criterion]
    parts += [f"{recipe.budget}{round(sparsity * 100)}"] if sparsity and recipe.keep_loss is None else []
    asked = {"speedup": recipe.speedup, "latency": recipe.latency, "loss": recipe.keep_loss}
    parts += [f"{name}{value:g}" for name, value in asked.items() if value is not None]
    return Path("-".join(parts + (["native"] if recipe.layout == "native" else [])))


def destinations(recipe: PruneRecipe, out: Path | None) -> list[Path]:
    """The output of each sparsity: `out` itself for one, beside it with the sparsity for several."""
    if out is None:
        return [default_output(recipe, target) for target in recipe.targets]
    if len(recipe.targets) == 1:
        return [out]
    return [out.with_name(f"{out.name}-{target:g}") for target in recipe.targets]


def prune(
    recipe: PruneRecipe, options: RunOptions, progress: Progress = silent
) -> PruneResult | PruneResults:
    """Prune a checkpoint and write the result; what is told to `recipe` decides its bytes.

    Returns:
        The numbers; one for each of several sparsities.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `progress`; the state is durable by then.
    """
    if recipe.component == ALL:
        return prune_all(recipe, options, progress)
    start = time.monotonic()
    if recipe.timed:
        check_alone("prune --speedup or --latency")
    processes = started(recipe, options)
    progress = clock = PhaseClock(progress)
    if processes.count > 1:
        progress = Together(clock, processes)
    for unused in unused_settings():
        notice(progress, unused)
    folders = destinations(recipe, options.out)
    device = processes.device
    with ExitStack() as claims:
        outputs = [claims.enter_context(claim(folder, options, main=processes.main)) for folder in folders]
        source = source_of(recipe, options, progress, config_only=options.dry_run)
        plan = make_plan(
            source,
            recipe,
            progress,
            weights_required=not options.dry_run or source.kind != "hub",
            device=device,
            facts=outputs[0].state({}).found() if options.resume else {},
        )
        inputs = {"--model": source.folder, "--data": recipe.data, "--prompts": recipe.prompts}
        for output in outputs:
            output.refuse_inputs(inputs)
        job = PruneJob(
            recipe,
            source,
            plan,
            device,
            progress,
            offload_teacher=options.offload_teacher,
            processes=processes,
        )
        if options.dry_run:
            for output in outputs:
                output.refuse_state()
            results = planned(plan, recipe, progress, start)
        else:
            records = make_networks(job, outputs, plan.component)
            results = [
                result_of(recipe.up_to(number), folder, record, start, clock)
                for number, (folder, record) in enumerate(zip(folders, records, strict=True))
            ]
    processes.wait()
    return results[0] if len(results) == 1 else PruneResults(networks=tuple(results))


def started(recipe: PruneRecipe, options: RunOptions) -> Processes:
    """The processes that share the run.

    Raises:
        UsageError: they are more than can share a step of its recovery.
    """
    processes = Processes.start(options.device)
    if recipe.recover and processes.count > FinetuneRecipe.batch:
        raise UsageError(
            f"recovery trains with batches of {FinetuneRecipe.batch}: {processes.count} processes cannot"
            " share: use --recover 0 and gfprune finetune with a larger --batch, or fewer processes"
        )
    return processes


def prune_all(recipe: PruneRecipe, options: RunOptions, progress: Progress) -> PruneResults:
    """Prune every denoiser of a pipeline to the same budget, each beside the dense others.

    A network lies in the run's state until all are there; a resumed run makes those that are not.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `progress`; the state is durable by then.
    """
    start = time.monotonic()
    check_alone("prune --component all")
    progress = clock = PhaseClock(progress)
    folder, device = destinations(recipe, options.out)[0], choose_device(options.device)
    with claim(folder, options) as output:
        source = source_of(recipe, options, progress, config_only=options.dry_run)
        output.refuse_inputs({"--model": source.folder, "--data": recipe.data, "--prompts": recipe.prompts})
        required = not options.dry_run or source.kind != "hub"
        jobs = []
        for name in denoiser_names(source.folder):
            plan = make_plan(
                source,
                replace(recipe, component=name),
                progress,
                weights_required=required,
                device=device,
                facts=StateFolder(output.state({}).parts / name, {}).found() if options.resume else {},
            )
            jobs.append(
                PruneJob(recipe, source, plan, device, progress, offload_teacher=options.offload_teacher)
            )
        if options.dry_run:
            output.refuse_state()
            return PruneResults(networks=tuple(planned(job.plan, recipe, progress, start)[0] for job in jobs))
        records = [finished_run(job, 0, folder) for job in jobs] if output.finished else None
        if records is None:
            records = make_all(jobs, output, options)
        output.state({}).end()
    found = [result_of(recipe, folder, record, start, clock) for record in records]
    return PruneResults(networks=tuple(found))


def make_all(jobs: list[PruneJob], output: Claim, options: RunOptions) -> list[dict[str, Any]]:
    """Make the networks of the jobs that are not there yet, and write them into one checkpoint."""
    state = output.state({})
    output.prepare(state)
    parts = {job.plan.component.name: state.parts / job.plan.component.name for job in jobs}
    records = []
    for job, part in zip(jobs, parts.values(), strict=True):
        bare = replace(job.plan.component, pipeline=None)
        with claim(part, replace(options, force=False, resume=True)) as own:
            records += make_networks(job, [own], bare)
    destination = output.destination
    jobs[0].progress(Event("write", text=f"writing {destination}"))
    write_joined(destination, parts, jobs[0].plan.component, joined(records), force=output.force)
    return records
