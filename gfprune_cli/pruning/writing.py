"""The networks of a job, made and written one after the other, and what is said of them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.record import finished_record
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.outputs.cache import sweep_caches
from gfprune_cli.outputs.claim import Claim
from gfprune_cli.outputs.state import not_finished, run_digest
from gfprune_cli.progress import Event, PhaseClock, Progress, notice
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.networks import Networks
from gfprune_cli.pruning.plan import Plan, planned_result
from gfprune_cli.pruning.record import make_record
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.device import deterministic


def planned(plan: Plan, recipe: PruneRecipe, progress: Progress, start: float) -> list[PruneResult]:
    """What a dry run says."""
    if plan.fold:
        notice(progress, f"--fold {plan.fold:g} is not in these numbers: ranks follow from the weights")
    if recipe.keep_loss is not None:
        notice(progress, f"--keep-loss {recipe.keep_loss:g} may stop before these numbers are reached")
    each = [recipe.up_to(number) for number in range(len(recipe.targets))]
    return [planned_result(plan, one, time.monotonic() - start) for one in each]


def make_networks(job: PruneJob, outputs: Sequence[Claim], component: Component) -> list[dict[str, Any]]:
    """Make the networks that are not there yet, and write each as soon as it is made; all their records.

    Args:
        component: where they are to stand: that of the job, or the same without its pipeline.
    """
    states = [output.state(job.identity(number)) for number, output in enumerate(outputs)]
    records: list[dict[str, Any] | None] = [None] * len(outputs)
    for number, (output, state) in enumerate(zip(outputs, states, strict=True)):
        if job.processes.told(output.finished):
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
            for number, model, outcome, picture in Networks(job, states).make(done):
                output = outputs[number]
                job.progress(Event("write", text=f"writing {output.destination}"))
                record = make_record(job, number, model, outcome)
                if output.main:
                    record = write_checkpoint(
                        output.destination, model, component, record, force=output.force, picture=picture
                    )
                records[number] = job.processes.said(record)
                states[number].end()
    return [record for record in records if record is not None]


def finished_run(job: PruneJob, number: int, destination: Path) -> dict[str, Any]:
    """The record of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(job.identity(number)), job.plan.component.name)
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
