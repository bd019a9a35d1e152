"""`prune`: from a checkpoint to a smaller one, end to end."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.record import finished_record
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.outputs.cache import sweep_caches
from gfprune_cli.outputs.claim import Claim, claim
from gfprune_cli.outputs.state import not_finished, run_digest
from gfprune_cli.progress import Event, PhaseClock, Progress, notice, silent
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.networks import Networks
from gfprune_cli.pruning.plan import Plan, make_plan, planned_result
from gfprune_cli.pruning.record import make_record
from gfprune_cli.pruning.result import PruneResult, PruneResults
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.device import choose_device, deterministic
from gfprune_cli.runtime.launch import check_alone


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
    start = time.monotonic()
    check_alone("prune")
    progress = clock = PhaseClock(progress)
    folders = destinations(recipe, options.out)
    device = choose_device(options.device)
    with ExitStack() as claims:
        outputs = [claims.enter_context(claim(folder, options)) for folder in folders]
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
            facts=outputs[0].state({}).found() if options.resume else {},
        )
        inputs = {"--model": source.folder, "--data": recipe.data, "--prompts": recipe.prompts}
        for output in outputs:
            output.refuse_inputs(inputs)
        job = PruneJob(recipe, source, plan, device, progress, offload_teacher=options.offload_teacher)
        if options.dry_run:
            for output in outputs:
                output.refuse_state()
            results = planned(plan, recipe, progress, start)
        else:
            records = make_networks(job, outputs)
            results = [
                result_of(recipe.up_to(number), folder, record, start, clock)
                for number, (folder, record) in enumerate(zip(folders, records, strict=True))
            ]
    return results[0] if len(results) == 1 else PruneResults(networks=tuple(results))


def planned(plan: Plan, recipe: PruneRecipe, progress: Progress, start: float) -> list[PruneResult]:
    """What a dry run says."""
    if plan.fold:
        notice(progress, f"--fold {plan.fold:g} is not in these numbers: ranks follow from the weights")
    if recipe.keep_loss is not None:
        notice(progress, f"--keep-loss {recipe.keep_loss:g} may stop before these numbers are reached")
    each = [recipe.up_to(number) for number in range(len(recipe.targets))]
    return [planned_result(plan, one, time.monotonic() - start) for one in each]


def make_networks(job: PruneJob, outputs: Sequence[Claim]) -> list[dict[str, Any]]:
    """Make the networks that are not there yet, and write each as soon as it is made; all their records."""
    states = [output.state(job.identity(number)) for number, output in enumerate(outputs)]
    records: list[dict[str, Any] | None] = [None] * len(outputs)
    for number, (output, state) in enumerate(zip(outputs, states, strict=True)):
        if output.finished:
            records[number] = finished_run(job, number, output.destination)
            if not state.foreign():  # killed after the output was published
                state.end()
        else:
            output.prepare(state)
    if job.plan.time is not None:
        states[0].facts = job.plan.time.facts
    if None in records:
        with deterministic():
            done = [record is not None for record in records]
            for number, model, outcome in Networks(job, states).make(done):
                output = outputs[number]
                job.progress(Event("write", text=f"writing {output.destination}"))
                record = make_record(job, number, model, outcome)
                component = job.plan.component
                records[number] = write_checkpoint(
                    output.destination, model, component, record, force=output.force
                )
                states[number].end()
    return [record for record in records if record is not None]


def finished_run(job: PruneJob, number: int, destination: Path) -> dict[str, Any]:
    """The record of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(job.identity(number)))
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
        limit=record.get("limit"),
        time=record.get("time"),
        **{name: record[name] for name in shared},
    )
