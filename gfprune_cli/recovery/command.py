"""`finetune`: bring the quality of a pruned checkpoint back."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.record import Record, finished_record, read_record
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import check_pipeline, write_checkpoint
from gfprune_cli.errors import UsageError
from gfprune_cli.outputs.cache import sweep_caches
from gfprune_cli.outputs.claim import Claim, claim
from gfprune_cli.outputs.state import not_finished, run_digest
from gfprune_cli.progress import Event, Progress, notice, silent
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.recovery.job import FinetuneJob, default_output
from gfprune_cli.recovery.logs import Watch, check_logger, check_logs, logs_folder, make_tracker, sweep_logs
from gfprune_cli.recovery.lora import load_peft
from gfprune_cli.recovery.memory import memory_text
from gfprune_cli.recovery.optimizers import eight_bit_optimizers
from gfprune_cli.recovery.result import FinetuneResult
from gfprune_cli.recovery.sharding import check_sharded
from gfprune_cli.recovery.teacher import find_teacher
from gfprune_cli.runtime.device import deterministic
from gfprune_cli.runtime.launch import unused_settings
from gfprune_cli.runtime.processes import Processes, lost_process


def finetune(recipe: FinetuneRecipe, options: RunOptions, progress: Progress = silent) -> FinetuneResult:
    """Train a pruned checkpoint, with the dense model as teacher, and write the result.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `progress`; the state is durable by then.
    """
    start = time.monotonic()
    destination = options.out or default_output(recipe)
    logs = logs_folder(destination, options.logs)
    check_recipe(recipe)
    check_logger(options.logger)
    processes = Processes.start(options.device, shards=True)
    for unused in unused_settings():
        notice(progress, unused)
    if recipe.batch < processes.count:
        raise UsageError(f"--batch {recipe.batch} is less than the {processes.count} processes that share it")
    if processes.sharded:
        check_sharded(recipe, processes, offload_teacher=options.offload_teacher)
    with claim(destination, options, main=processes.main) as output:
        component, record = pruned_checkpoint(recipe, offline=options.offline, progress=progress)
        teacher = find_teacher(component, record, recipe, offline=options.offline, progress=progress)
        job = FinetuneJob(
            recipe, component, record, teacher, processes, progress, offload_teacher=options.offload_teacher
        )
        refuse_folders(output, logs, recipe, component, teacher.component)
        if options.dry_run:
            output.refuse_state()
            refuse_logs(output, logs)
            notice(progress, memory_text(job.held))
            return result_of(job, {}, None, None, time.monotonic() - start)
        state = output.state(job.identity())
        if processes.told(output.finished):
            losses = finished_run(job, destination)
            if processes.main:
                sweep_logs(logs)
                if not state.foreign():  # killed after the output was published
                    state.end()
            return result_of(job, losses, destination, logs, time.monotonic() - start)
        if processes.main:
            output.prepare(state)
            refuse_logs(output, logs)
        processes.wait()
        tracker = make_tracker(options.logger, logs, destination.name) if processes.main else None
        with deterministic(), lost_process():
            model, losses, shown = job.execute(
                state,
                save_every=options.save_every,
                sample_every=options.sample_every,
                open_watch=(lambda done: Watch(logs, done, tracker)) if processes.main else None,
            )
        if processes.main:
            assert model is not None
            progress(Event("write", text=f"writing {destination}"))
            document = job.make_record(losses)
            write_checkpoint(destination, model, component, document, force=options.force, picture=shown)
            state.end()
    processes.wait()
    return result_of(job, losses, destination, logs, time.monotonic() - start)


def finished_run(job: FinetuneJob, destination: Path) -> Mapping[str, float]:
    """The losses of an output that this run wrote before it was killed, or long ago.

    Raises:
        UsageError: another run did.
    """
    record = finished_record(destination, run_digest(job.identity()), job.component.name)
    if record is None or not record.get("finetune"):
        raise not_finished(destination)
    entry = record["finetune"][-1]
    if entry["data"] is not None:  # the digest is of the settings, not of what --data holds
        job.draws(job.dense())
        if entry["data"] != job.fingerprint:
            raise not_finished(destination)
    sweep_caches()
    notice(job.progress, f"{destination} is finished: there is nothing left to do")
    losses: Mapping[str, float] = entry["loss"]
    return losses


def result_of(
    job: FinetuneJob, losses: Mapping[str, float], output: Path | None, logs: Path | None, seconds: float
) -> FinetuneResult:
    """The numbers of a run; no losses in a dry one."""
    return FinetuneResult(
        model=job.recipe.model,
        teacher=job.teacher.source.label,
        output=str(output) if output else None,
        logs=str(logs) if logs else None,
        component=job.component.name,
        class_name=job.component.class_name,
        params=sum(math.prod(info.shape) for info in job.component.tensors.values()),
        steps=job.recipe.steps,
        processes=job.processes.count,
        seed=job.recipe.seed,
        loss={key: losses.get(key) for key in ("before", "after", "teacher")},
        seconds=round(seconds, 3),
    )


def refuse_logs(output: Claim, logs: Path) -> None:
    """Refuse logs of another run, which this one neither replaces nor continues."""
    own = output.finished or output.state({}).begun()
    check_logs(logs, may_replace=output.force or own)


def check_recipe(recipe: FinetuneRecipe) -> None:
    """Refuse settings that no run can follow.

    Raises:
        UsageError: nothing to learn from, or options that do not go together.
    """
    if not (recipe.denoise_weight or recipe.distill or recipe.features or recipe.jacobian):
        raise UsageError("all loss weights are 0: give --denoise, --distill, --features or --jacobian one")
    if recipe.jacobian and recipe.teacher_precision != "fp32":
        raise UsageError("--jacobian takes differences in float32: drop it, or --teacher-precision")
    if recipe.lora:
        load_peft()
    if recipe.optimizer == "adamw8bit":
        eight_bit_optimizers()
    check_by_block(recipe)
    if recipe.compile and recipe.checkpointing and recipe.features:
        raise UsageError("--compile, --checkpointing and --features do not go together: drop one of them")


def check_by_block(recipe: FinetuneRecipe) -> None:
    """Refuse what needs passes through the whole network, where blocks train one by one.

    Raises:
        UsageError: which setting.
    """
    whole = {
        "--lora": recipe.lora is not None,
        "--features": bool(recipe.features),
        "--jacobian": bool(recipe.jacobian),
        "--min-snr": recipe.min_snr is not None,
        "--compile": recipe.compile,
    }
    for flag, given in whole.items():
        if recipe.by_block and given:
            raise UsageError(f"--by-block compares the layers of a block and nothing else: drop {flag}")


def pruned_checkpoint(
    recipe: FinetuneRecipe, *, offline: bool, progress: Progress
) -> tuple[Component, Record]:
    """The checkpoint to train, and its record.

    Raises:
        UsageError: it was never pruned.
    """
    source = resolve(recipe.model, revision=recipe.revision, offline=offline, progress=progress)
    component = inspect(source, component=recipe.component)
    record = read_record(component.root, component.name)
    if record is None:
        raise UsageError(
            f"--model {recipe.model} was never pruned (no gfprune.json says so): start with gfprune prune"
        )
    if record.component != component.name:
        raise UsageError(f"--component {component.name} was not pruned: name {record.component}, which was")
    check_pipeline(component)
    return component, record


def refuse_folders(
    output: Claim, logs: Path, recipe: FinetuneRecipe, student: Component, teacher: Component
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
    output.refuse_inputs(inputs)
    for flag, used in inputs.items():
        if used and logs.resolve().is_relative_to(Path(used).resolve()):
            raise UsageError(f"the logs {logs} would lie in {flag} {used}: name another folder with --logs")
    if logs.resolve().is_relative_to(output.destination.resolve()):
        raise UsageError(f"--logs {logs} lies in --out, which appears only at the end: name another folder")
