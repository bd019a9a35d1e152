"""`finetune`: bring the quality of a pruned checkpoint back."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from gfprune_cli.checkpoint.durable import check_destination, is_output, refuse_overlaps
from gfprune_cli.checkpoint.locks import claimed
from gfprune_cli.checkpoint.reader import Component, inspect, load_model
from gfprune_cli.checkpoint.record import Record, read_record
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.state import StateFolder, finished_record, not_finished, run_digest
from gfprune_cli.checkpoint.writer import check_pipeline, write_checkpoint
from gfprune_cli.data.cache import sweep_caches
from gfprune_cli.device import deterministic
from gfprune_cli.errors import UsageError
from gfprune_cli.launch import unused_settings
from gfprune_cli.processes import Processes
from gfprune_cli.progress import Event, Report, notice, silent
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.result import FinetuneResult
from gfprune_cli.recovery.run import Run, default_output
from gfprune_cli.recovery.teacher import find_teacher
from gfprune_cli.recovery.watch import Watch, check_logger, check_logs, logs_folder, make_tracker, sweep_logs

__all__ = ["FinetuneResult", "finetune"]


def finetune(
    recipe: FinetuneRecipe,
    *,
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    save_every: int = 100,
    sample_every: int = 100,
    logs: Path | None = None,
    logger: str | None = None,
    offline: bool = False,
    device: str | None = None,
    offload_teacher: bool = False,
    report: Report = silent,
) -> FinetuneResult:
    """Train a pruned checkpoint, with the dense model as teacher, and write the result.

    Args:
        recipe: what to do; decides the bytes of the output.
        out: destination folder; by default named after the model.
        force: replace a destination that is not empty, and discard the state of an interrupted run.
        resume: go on from the state of an interrupted run, if there is one; nothing to do if it finished.
        dry_run: check the inputs only; nothing is written.
        save_every, sample_every: steps between saved states, and between sample grids; 0 for none.
        logs: folder of metrics and samples; by default `OUT-logs`.
        logger: "tensorboard" or "trackio", if installed.
        offline: never use the network.
        device: torch device; by default CUDA if there is one.

    Returns:
        The numbers before and after.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `report`; the state is durable by then.
    """
    start = time.monotonic()
    destination = Path(out).expanduser() if out is not None else default_output(recipe)
    folder = logs_folder(destination, Path(logs).expanduser() if logs is not None else None)
    check_recipe(recipe)
    check_logger(logger)
    processes = Processes.start(device)
    for unused in unused_settings():
        notice(report, unused)
    if recipe.batch < processes.count:
        raise UsageError(f"--batch {recipe.batch} is less than the {processes.count} processes that share it")
    check = partial(check_destination, destination, force=force, resume=resume)
    if not processes.main and not dry_run:
        check()  # refused by one, refused by all: none waits for another
    with claimed(destination, check) if processes.main and not dry_run else nullcontext():
        component, record = pruned_checkpoint(recipe, offline=offline, report=report)
        teacher = find_teacher(component, record, recipe, offline=offline, report=report)
        run = Run(recipe, component, record, teacher, processes, report, offload_teacher=offload_teacher)
        if dry_run:
            return summary(run, {}, None, None, time.monotonic() - start)
        refuse_folders(destination, folder, recipe, component, teacher.component)
        state = StateFolder(destination, run.identity())
        if processes.told(resume and not force and is_output(destination)):
            losses = finished_run(run, destination)
            if processes.main:
                sweep_logs(folder)
                if not state.foreign():  # killed after the output was published
                    state.end()
            return summary(run, losses, destination, folder, time.monotonic() - start)
        if processes.main:
            prepare(state, folder, force=force, resume=resume)
        processes.wait()
        tracker = make_tracker(logger, folder, destination.name) if processes.main else None
        with deterministic():
            model, losses = run.execute(
                state,
                save_every=save_every,
                sample_every=sample_every,
                open_watch=(lambda done: Watch(folder, done, tracker)) if processes.main else None,
            )
        if processes.main:
            report(Event("write", text=f"writing {destination}"))
            write_checkpoint(destination, model, component, run.make_record(losses), force=force)
            state.end()
    processes.wait()
    return summary(run, losses, destination, folder, time.monotonic() - start)


def finished_run(run: Run, destination: Path) -> Mapping[str, float]:
    """The losses of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(run.identity()))
    if record is None or not record.get("finetune"):
        raise not_finished(destination)
    entry = record["finetune"][-1]
    if entry["data"] is not None:  # the digest is of the settings, not of what --data holds
        run.draws(run.place(load_model(run.teacher.component)))
        if entry["data"] != run.fingerprint:
            raise not_finished(destination)
    sweep_caches()
    notice(run.report, f"{destination} is finished: there is nothing left to do")
    losses: Mapping[str, float] = entry["loss"]
    return losses


def summary(
    run: Run, losses: Mapping[str, float], output: Path | None, logs: Path | None, seconds: float
) -> FinetuneResult:
    """The numbers of a run; no losses in a dry one."""
    return FinetuneResult(
        run.recipe.model,
        run.teacher.source.label,
        str(output) if output else None,
        str(logs) if logs else None,
        run.component.name,
        run.component.class_name,
        sum(math.prod(info.shape) for info in run.component.tensors.values()),
        run.recipe.steps,
        run.processes.count,
        run.recipe.seed,
        {key: losses.get(key) for key in ("before", "after", "teacher")},
        round(seconds, 3),
    )


def check_recipe(recipe: FinetuneRecipe) -> None:
    """Refuse settings that no run can follow.

    Raises:
        UsageError: nothing to learn from, or options that do not go together.
    """
    if not (recipe.denoise or recipe.distill or recipe.features or recipe.jacobian):
        raise UsageError("all loss weights are 0: give --denoise, --distill, --features or --jacobian one")
    if recipe.compile and recipe.checkpointing and recipe.features:
        raise UsageError("--compile, --checkpointing and --features do not go together: drop one of them")


def pruned_checkpoint(recipe: FinetuneRecipe, *, offline: bool, report: Report) -> tuple[Component, Record]:
    """The checkpoint to train, and its record.

    Raises:
        UsageError: it was never pruned.
    """
    source = resolve(recipe.model, revision=recipe.revision, offline=offline, report=report)
    component = inspect(source, component=recipe.component)
    record = read_record(component.root)
    if record is None:
        raise UsageError(
            f"--model {recipe.model} was never pruned (no gfprune.json says so): start with gfprune prune"
        )
    if record.component != component.name:
        raise UsageError(f"--component {component.name} was not pruned: name {record.component}, which was")
    check_pipeline(component)
    return component, record


def refuse_folders(
    destination: Path, logs: Path, recipe: FinetuneRecipe, student: Component, teacher: Component
) -> None:
    """Refuse an output that would replace an input, and logs that would lie in either.

    Raises:
        UsageError: which folder lies in which.
    """
    data = None if recipe.data == "self" else recipe.data
    inputs = {
        "--model": student.root,
        "--teacher": teacher.root,
        "--data": data,
        "--prompts": recipe.prompts,
    }
    refuse_overlaps(destination, inputs)
    for flag, used in inputs.items():
        if used and logs.resolve().is_relative_to(Path(used).resolve()):
            raise UsageError(f"the logs {logs} would lie in {flag} {used}: name another folder with --logs")
    if logs.resolve().is_relative_to(destination.resolve()):
        raise UsageError(f"--logs {logs} lies in --out, which appears only at the end: name another folder")


def prepare(state: StateFolder, logs: Path, *, force: bool, resume: bool) -> None:
    """Discard or refuse state and logs of an earlier run, unless it is to be continued."""
    if force and not resume:
        state.clear()
    if state.exists() and not resume:
        raise UsageError(
            f"an interrupted run left its state in {state.folder}: "
            "continue it with --resume, or discard it with --force"
        )
    check_logs(logs, may_replace=force or state.begun())
