"""`finetune`: bring the quality of a pruned checkpoint back."""

import math
import time
from pathlib import Path

from gfprune_cli.checkpoint.durable import StateFolder, check_destination, recover
from gfprune_cli.checkpoint.reader import Component, inspect
from gfprune_cli.checkpoint.record import Record, read_record
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import check_pipeline, write_checkpoint
from gfprune_cli.device import deterministic
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import Event, Report, silent
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.processes import Processes
from gfprune_cli.recovery.result import FinetuneResult
from gfprune_cli.recovery.run import Run, default_output
from gfprune_cli.recovery.teacher import find_teacher
from gfprune_cli.recovery.watch import Watch, check_logs, logs_folder, make_tracker

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
    report: Report = silent,
) -> FinetuneResult:
    """Train a pruned checkpoint, with the dense model as teacher, and write the result.

    Args:
        recipe: what to do; decides the bytes of the output.
        out: destination folder; by default named after the model.
        force: replace a destination that is not empty, and discard the state of an interrupted run.
        resume: go on from the state of an interrupted run, if there is one.
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
    folder = logs_folder(destination, logs)
    check_recipe(recipe)
    processes = Processes.start(device)
    if not dry_run and processes.main:
        recover(destination)
        check_destination(destination, force=force)
        check_logs(folder, may_replace=force or resume)
    component, record = pruned_checkpoint(recipe, offline=offline, report=report)
    teacher = find_teacher(component, record, recipe, offline=offline, report=report)
    run = Run(recipe, component, record, teacher, processes, report)

    def result(losses: dict[str, float], output: Path | None) -> FinetuneResult:
        return FinetuneResult(
            recipe.model,
            teacher.source.label,
            str(output) if output else None,
            str(folder) if output else None,
            component.name,
            component.class_name,
            sum(math.prod(info.shape) for info in component.tensors.values()),
            recipe.steps,
            processes.count,
            recipe.seed,
            {key: losses.get(key) for key in ("before", "after", "teacher")},
            round(time.monotonic() - start, 3),
        )

    if dry_run:
        return result({}, None)
    refuse_own_inputs(destination, recipe, component, teacher.component)
    state = StateFolder(destination, run.identity())
    prepare_state(state, processes, force=force, resume=resume)
    tracker = make_tracker(logger, folder, destination.name)
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
        state.clear()
    processes.wait()
    return result(losses, destination)


def check_recipe(recipe: FinetuneRecipe) -> None:
    if not (recipe.denoise or recipe.distill or recipe.features or recipe.jacobian):
        raise UsageError("all loss weights are 0: give --denoise, --distill, --features or --jacobian one")


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
            f"--model {recipe.model} was never pruned (it has no gfprune.json): start with gfprune prune"
        )
    if record.component != component.name:
        raise UsageError(f"--component {component.name} was not pruned: name {record.component}, which was")
    check_pipeline(component)
    return component, record


def refuse_own_inputs(
    destination: Path, recipe: FinetuneRecipe, student: Component, teacher: Component
) -> None:
    data = None if recipe.data == "self" else Path(recipe.data)
    for name, used in (("--model", student.root), ("--teacher", teacher.root), ("--data", data)):
        if used is not None and used.resolve().is_relative_to(destination.resolve()):
            raise UsageError(f"--out {destination} would replace {name} {used}: name another folder")


def prepare_state(state: StateFolder, processes: Processes, *, force: bool, resume: bool) -> None:
    """Discard or refuse the state of an earlier run, unless it is to be continued."""
    if processes.main:
        if force and not resume:
            state.clear()
        if state.exists() and not resume:
            raise UsageError(
                f"an interrupted run left its state in {state.folder}: "
                "continue it with --resume, or discard it with --force"
            )
    processes.wait()
