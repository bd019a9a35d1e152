"""`eval`: how good a model is, how close to its original, how much faster and smaller."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.record import SCHEMA_VERSION, read_document
from gfprune_cli.data.calibration import cache_folder
from gfprune_cli.errors import UsageError
from gfprune_cli.evaluation.inputs import Inputs, gather
from gfprune_cli.evaluation.job import draw_all, latency_batches, measured
from gfprune_cli.evaluation.measures import Measures, png
from gfprune_cli.evaluation.quality import statistics_bytes
from gfprune_cli.evaluation.result import EvalResult
from gfprune_cli.evaluation.sampling import one_at_a_time
from gfprune_cli.outputs.durable import (
    check_destination,
    is_output,
    refuse_overlaps,
    staged,
    write_file,
    write_json,
)
from gfprune_cli.outputs.locks import claimed, exclusive, lock_of, state_folder
from gfprune_cli.outputs.samples import SampleStore
from gfprune_cli.outputs.state import not_finished
from gfprune_cli.progress import Progress, notice, silent
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.device import deterministic
from gfprune_cli.runtime.launch import unused_settings
from gfprune_cli.runtime.processes import Processes


def evaluate(
    recipe: EvalRecipe,
    options: RunOptions,
    progress: Progress = silent,
    publish: Callable[[EvalResult], None] | None = None,
) -> EvalResult | None:
    """Evaluate a model, against a dense reference if there is one.

    Args:
        publish: gets the result while the samples are still kept, so that nothing is lost if it fails.

    Returns:
        What was found; None in every process but the first of those that a launcher started.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `progress`; finished chunks of samples are durable by then.
    """
    start = time.monotonic()
    processes = Processes.start(options.device)
    for unused in unused_settings():
        notice(progress, unused)
    inputs = checked_inputs(recipe, options, processes, progress)
    progress, out = inputs.remarks.progress, options.out
    store = sample_store(inputs, processes.device, beside_of(options))
    if out is None:
        lock = exclusive(store.folder)
    else:
        check = partial(check_destination, out, force=options.force, resume=options.resume)
        lock = claimed(out, check)
    with lock if processes.main else nullcontext():
        if processes.main:  # the others find the folder as it was left here
            if out is not None and is_output(out) and not options.force:
                check_own(out, inputs)
            store.check(resume=options.resume, force=options.force)
            store.begin(resume=options.resume)
        processes.wait()
        networks = {role: subject.load(processes.device) for role, subject in inputs.subjects.items()}
        with deterministic():
            draw_all(inputs, networks, store, processes, progress)
        processes.wait()
        processes.part()
        if not processes.main:
            return None
        measures = Measures(inputs, store, networks, processes.device, progress)
        result = measured(measures, start)
        if out is not None:
            write_samples(out, measures, result, force=options.force or options.resume)
        if options.save_stats is not None and measures.real is not None and inputs.extractor is not None:
            write_file(options.save_stats, statistics_bytes(measures.real, inputs.extractor))
        if publish is not None:
            publish(result)
        store.end()
    return result


def checked_inputs(
    recipe: EvalRecipe, options: RunOptions, processes: Processes, progress: Progress
) -> Inputs:
    """What the evaluation works on, once nothing stands in the way of what it is to write.

    Raises:
        UsageError: settings that do not go together, or an output that would replace something.
    """
    out, save_stats = options.out, options.save_stats
    if out is not None:
        check_destination(out, force=options.force, resume=options.resume)
        check_samples(out)
    latency_batches(recipe)
    if out is not None and save_stats is not None and save_stats.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"--save-stats {save_stats} lies in --out {out}, which is written whole: name another"
        )
    inputs = gather(
        recipe, processes, save_stats=save_stats is not None, offline=options.offline, progress=progress
    )
    if out is not None:
        folders = {f"--{role}": subject.source.folder for role, subject in inputs.subjects.items()}
        files = {"--data": recipe.data, "--prompts": recipe.prompts, "--inception": recipe.inception}
        refuse_overlaps(out, {**folders, **files})
    if out is not None and inputs.model.latent:
        raise UsageError("--out is for pictures, and this pipeline works on latents: drop the flag")
    return inputs


def beside_of(options: RunOptions) -> Path | None:
    """What the state of a run lies hidden beside: its folder, or else a file that it writes."""
    return options.out or options.html or options.markdown or options.save_stats


def check_samples(out: Path) -> None:
    """Refuse, with `--force` too, to put samples in the place of a checkpoint or an artefact.

    Raises:
        UsageError: another command wrote what is there; GfpruneError: its record cannot be read.
    """
    record = record_in(out)
    if record is not None and record.get("command") != "eval":
        raise UsageError(f"--out {out} is no folder of samples, but an output to keep: name another")


def record_in(out: Path) -> dict[str, Any] | None:
    """The record of an output of gfprune; None where there is no output."""
    return read_document(out) if is_output(out) else None


def earlier_record(out: Path, recipe: EvalRecipe) -> dict[str, Any] | None:
    """The record of an output that the same command wrote before it was killed; None for anything else."""
    record = record_in(out) or {}
    same = record.get("command") == "eval" and record.get("recipe") == recipe.document()
    return record if same else None


def check_own(out: Path, inputs: Inputs) -> None:
    """Make sure that the same command wrote an output, on the same weights.

    Raises:
        UsageError: it did not.
    """
    earlier = earlier_record(out, inputs.recipe)
    if earlier is None or earlier.get("weights") != inputs.weights:
        raise not_finished(out)


def continues(recipe: EvalRecipe, options: RunOptions) -> bool:
    """Whether the same command was killed after it began: then its pages are its own to replace."""
    out, place = options.out, beside_of(options)
    state = None if place is None else state_folder(place)
    left = state is not None and (state.is_dir() or lock_of(state).exists())
    return left or (out is not None and earlier_record(out, recipe) is not None)


def sample_store(inputs: Inputs, device: torch.device, beside: Path | None) -> SampleStore:
    """Where the samples lie until the run ends: hidden beside its output, else in the cache."""
    identity = inputs.identity(device)
    if beside is not None:
        folder = state_folder(beside)
    else:
        text = json.dumps(identity, sort_keys=True, default=str)
        folder = cache_folder() / "eval" / hashlib.sha256(text.encode()).hexdigest()[:32]
    alone = one_at_a_time(inputs.settings, inputs.model.scheduler)
    return SampleStore(folder, identity, inputs.settings.samples, 1 if alone else inputs.recipe.batch)


def write_samples(out: Path, measures: Measures, result: EvalResult, *, force: bool) -> None:
    """The samples as PNG files, one folder for each model, and the record of the run."""
    inputs = measures.inputs
    record = {
        "schema_version": SCHEMA_VERSION,
        "command": "eval",
        "recipe": inputs.recipe.document(),
        "weights": inputs.weights,
        "result": result.document(),
    }
    with staged(out, force=force) as folder:
        for role in inputs.subjects:
            (folder / role).mkdir()
            for number, image in enumerate(chain.from_iterable(measures.shown(role))):
                (folder / role / f"{number:06d}.png").write_bytes(png(image))
        write_json(folder / "gfprune.json", record)
