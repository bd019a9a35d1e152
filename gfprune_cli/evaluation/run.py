"""One evaluation from end to end: draw from both models, compare, time, judge."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.durable import (
    check_destination,
    is_output,
    refuse_overlaps,
    staged,
    write_file,
    write_json,
)
from gfprune_cli.checkpoint.files import read_json, trusted_roots
from gfprune_cli.checkpoint.locks import claimed, exclusive, lock_of, state_folder
from gfprune_cli.checkpoint.record import RECORD_BYTES
from gfprune_cli.checkpoint.state import not_finished
from gfprune_cli.data.calibration import cache_folder
from gfprune_cli.data.conditions import Condition, call
from gfprune_cli.device import autocast, deterministic
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.inputs import Inputs, gather
from gfprune_cli.evaluation.measures import Measures, files
from gfprune_cli.evaluation.quality import statistics_bytes
from gfprune_cli.evaluation.result import EvalResult, passed_gates, tools
from gfprune_cli.evaluation.sampling import draw, make_sampling, one_at_a_time
from gfprune_cli.evaluation.store import SampleStore
from gfprune_cli.launch import unused_settings
from gfprune_cli.processes import Processes
from gfprune_cli.progress import Event, Report, notice, silent
from gfprune_cli.pruning.result import SCHEMA_VERSION
from gfprune_cli.recipes.evaluate import EvalRecipe

REPEATS = 20  # timed passes of each network


def evaluate(
    recipe: EvalRecipe,
    *,
    out: Path | None = None,
    save_stats: Path | None = None,
    beside: Path | None = None,
    force: bool = False,
    resume: bool = False,
    publish: Callable[[EvalResult], None] | None = None,
    offline: bool = False,
    device: str | None = None,
    report: Report = silent,
) -> EvalResult | None:
    """Evaluate a model, against a dense reference if there is one.

    Args:
        recipe: what to do; decides the numbers.
        out: also write the samples as PNG files in this folder, with the record of the run.
        save_stats: also write the statistics of the images of `--data` to this .npz file.
        beside: a file that the caller will write; the state of the run lies hidden beside it.
        force: replace what exists at `out`, and discard the samples of an interrupted run.
        resume: go on from the samples of an interrupted run, if there are any.
        publish: gets the result while the samples are still kept, so that nothing is lost if it fails.
        offline: never use the network.
        device: torch device; by default CUDA if there is one.

    Returns:
        What was found; None in every process but the first of those that a launcher started.

    Raises:
        UsageError: wrong settings; GfpruneError: anything that went wrong at run time;
        Interrupted: raised by `report`; finished chunks of samples are durable by then.
    """
    start = time.monotonic()
    processes = Processes.start(device)
    for unused in unused_settings():
        notice(report, unused)
    if out is not None:
        check_destination(out, force=force, resume=resume)
        check_samples(out)
    latency_batches(recipe)
    if out is not None and save_stats is not None and save_stats.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"--save-stats {save_stats} lies in --out {out}, which is written whole: name another"
        )
    inputs = gather(recipe, processes, save_stats=save_stats is not None, offline=offline, report=report)
    report = inputs.remarks.report
    if out is not None:
        refuse_overlaps(out, named_by_flags(inputs))
    if out is not None and inputs.model.latent:
        raise UsageError("--out is for pictures, and this pipeline works on latents: drop the flag")
    store = sample_store(inputs, processes.device, out or beside)
    if out is None:
        lock = exclusive(store.folder)
    else:
        lock = claimed(out, partial(check_destination, out, force=force, resume=resume))
    with lock if processes.main else nullcontext():
        if processes.main:  # the others find the folder as it was left here
            if out is not None and is_output(out) and not force:
                check_own(out, inputs)
            store.check(resume=resume, force=force)
            store.begin(resume=resume)
        processes.wait()
        networks = {role: subject.load(processes.device) for role, subject in inputs.subjects.items()}
        with deterministic():
            draw_all(inputs, networks, store, processes, report)
        processes.wait()
        processes.part()
        if not processes.main:
            return None
        measures = Measures(inputs, store, networks, processes.device, report)
        result = measured(measures, start)
        if out is not None:
            write_samples(out, measures, result, force=force or resume)
        if save_stats is not None and measures.real is not None and inputs.extractor is not None:
            write_file(save_stats, statistics_bytes(measures.real, inputs.extractor))
        if publish is not None:
            publish(result)
        store.end()
    return result


def check_samples(out: Path) -> None:
    """Refuse, with `--force` too, to put samples in the place of a checkpoint or an artefact.

    Raises:
        UsageError: another command wrote what is there; GfpruneError: its record cannot be read.
    """
    record = record_in(out)
    if record is not None and record.get("command") != "eval":
        raise UsageError(f"--out {out} is no folder of samples, but an output to keep: name another")


def named_by_flags(inputs: Inputs) -> dict[str, Path | str | None]:
    """What the flags name that must not be replaced."""
    recipe = inputs.recipe
    folders: dict[str, Path | str | None] = {
        f"--{role}": subject.source.folder for role, subject in inputs.subjects.items()
    }
    return folders | {"--data": recipe.data, "--prompts": recipe.prompts, "--inception": recipe.inception}


def record_in(out: Path) -> dict[str, Any] | None:
    """The record of an output of gfprune; None where there is no output."""
    if not is_output(out):
        return None
    return read_json(out / "gfprune.json", trusted_roots(out), limit=RECORD_BYTES)


def earlier_record(out: Path, recipe: EvalRecipe) -> dict[str, Any] | None:
    """The record of an output that the same command wrote before it was killed; None for anything else."""
    record = record_in(out)
    same = (
        record is not None and record.get("command") == "eval" and record.get("recipe") == recipe.document()
    )
    return record if same else None


def check_own(out: Path, inputs: Inputs) -> None:
    """Make sure that the same command wrote an output, on the same weights.

    Raises:
        UsageError: it did not.
    """
    earlier = earlier_record(out, inputs.recipe)
    if earlier is None or earlier.get("weights") != weights(inputs):
        raise not_finished(out)


def continues(recipe: EvalRecipe, *, out: Path | None, beside: Path | None) -> bool:
    """Whether the same command was killed after it began: then its pages are its own to replace.

    Args:
        out, beside: as for `evaluate`.
    """
    state = None if out is None and beside is None else state_folder(Path(out or beside or ""))
    left = state is not None and (state.is_dir() or lock_of(state).exists())
    return left or (out is not None and earlier_record(out, recipe) is not None)


def weights(inputs: Inputs) -> dict[str, Any]:
    """SHA-256 of the weight files, by role and file name."""
    return {role: dict(subject.hashes) for role, subject in inputs.subjects.items()}


def measured(measures: Measures, start: float) -> EvalResult:
    """All numbers, once the samples are drawn; `start` is the run's, on the monotonic clock."""
    inputs, recipe = measures.inputs, measures.inputs.recipe
    with deterministic():
        metrics = measures.consistency() | measures.quality() | measures.teacher_distance()
        losses = measures.losses()
    metrics |= losses.metrics()
    costs = measure_costs(inputs, measures.networks, measures.device, measures.report)
    return EvalResult(
        model=inputs.model.label,
        reference=inputs.reference.label if inputs.reference else None,
        component=inputs.model.component.name,
        class_name=inputs.model.component.class_name,
        samples=described_samples(inputs),
        metrics=metrics,
        loss_by_timestep=losses.by_timestep(),
        latency=costs.latency,
        params=costs.params,
        macs=costs.macs,
        bytes={
            "model": inputs.model.component.bytes,
            "reference": inputs.reference.component.bytes if inputs.reference else None,
        },
        memory=costs.memory,
        gates=passed_gates(recipe, metrics, costs.latency),
        warnings=inputs.remarks.texts,
        device=str(measures.device),
        tools=tools(),
        recipe=recipe.document(),
        seconds=round(time.monotonic() - start, 3),
        grid=measures.grid(),
    )


def sample_store(inputs: Inputs, device: torch.device, beside: Path | None) -> SampleStore:
    """Where the samples lie until the run ends: hidden beside its output, else in the cache."""
    identity = inputs.identity(device)
    if beside is not None:
        folder = state_folder(Path(beside).expanduser())
    else:
        text = json.dumps(identity, sort_keys=True, default=str)
        folder = cache_folder() / "eval" / hashlib.sha256(text.encode()).hexdigest()[:32]
    alone = one_at_a_time(inputs.settings, inputs.model.scheduler)
    return SampleStore(folder, identity, inputs.settings.samples, 1 if alone else inputs.recipe.batch)


def draw_all(
    inputs: Inputs,
    networks: Mapping[str, nn.Module],
    store: SampleStore,
    processes: Processes,
    report: Report,
) -> None:
    """Draw what is not there yet; each process every so-manyth chunk, so that chunks are always the same."""
    task = inputs.task
    sampling = make_sampling(inputs.settings, task.plain, inputs.model.scheduler, task.mu)
    conditions = task.conditions(inputs.settings.samples)
    starts = task.given.images if task.reconstructs and task.given is not None else None
    own = [(role, chunk) for role in networks for chunk in store.chunks[processes.rank :: processes.count]]
    total = sum(len(store.members(chunk)) for _, chunk in own)
    done = 0
    for role, chunk in own:
        members = store.members(chunk)
        if not store.has(role, chunk):

            def draw_some(members: range, role: str = role, done: int = done) -> torch.Tensor:
                chosen = None if conditions is None else conditions[list(members)].to(processes.device)
                tick = partial(report, Event("sample", done, total))
                return draw(
                    sampling,
                    task.sampled(denoiser(networks[role], chosen, inputs.recipe, tick)),
                    members=members,
                    shape=task.shape,
                    seed=inputs.recipe.seed,
                    device=processes.device,
                    what=inputs.subjects[role].label,
                    given=None if starts is None else starts[list(members)],
                )

            store.put(role, chunk, in_parts(draw_some, members))
        done += len(members)
        report(Event("sample", done, total))


def in_parts(draw_some: Callable[[range], torch.Tensor], members: range) -> torch.Tensor:
    """What `draw_some` draws; in halves where memory runs out, as every image has its own seed.

    Raises:
        GfpruneError: one image alone does not fit.
    """
    try:
        return draw_some(members)
    except torch.OutOfMemoryError as error:
        if len(members) == 1:
            raise GfpruneError(
                "out of memory with one sample: use a larger device, or --device cpu"
            ) from error
    middle = len(members) // 2
    return torch.cat([in_parts(draw_some, part) for part in (members[:middle], members[middle:])])


def denoiser(network: nn.Module, condition: Condition, recipe: EvalRecipe, tick: Any) -> Any:
    """(noisy images, timesteps) -> network output, in the precision of the recipe."""

    def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        tick()
        with autocast(x.device, recipe.precision):
            return call(network, x, timesteps, condition).float()

    return denoise


@dataclass(frozen=True)
class Costs:
    """Latency rows, and numbers of the model and the reference."""

    latency: list[dict[str, Any]]
    params: dict[str, int | None]
    macs: dict[str, int | None]
    memory: dict[str, Any]


def latency_batches(recipe: EvalRecipe) -> list[int]:
    """The batch sizes to time, ascending.

    Raises:
        UsageError: not a list of positive whole numbers.
    """
    try:
        found = sorted({int(part) for part in recipe.latency_batches.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UsageError(f"--latency-batches {recipe.latency_batches!r}: use whole numbers such as 1,64")
    return found


def measure_costs(
    inputs: Inputs, networks: Mapping[str, nn.Module], device: torch.device, report: Report
) -> Costs:
    """How large, and unless `--no-latency` how fast: both networks in one interleaved run."""
    from gfprune_cli.evaluation.cost import macs, measure_latency, memory_measured, peak_memory

    recipe, roles = inputs.recipe, ("model", "reference")
    both = {role: networks.get(role) for role in roles}
    params = {
        role: None if network is None else sum(parameter.numel() for parameter in network.parameters())
        for role, network in both.items()
    }
    work = {
        role: None if network is None else macs(network, inputs.task.sample_inputs)
        for role, network in both.items()
    }
    ratio = work["reference"] / work["model"] if work["reference"] and work["model"] else None
    batches = latency_batches(recipe)
    what = memory_measured(batches[-1])
    if recipe.no_latency:
        return Costs([], params, work, {"model": None, "reference": None, "what": what})
    memory: dict[str, Any] = {
        role: None
        if network is None
        else peak_memory(
            network,
            batch=batches[-1],
            device=device,
            precision=recipe.precision,
            report=report,
            inputs=inputs.task.network_inputs,
        )
        for role, network in both.items()
    }
    rows = measure_latency(
        networks["model"],
        networks.get("reference"),
        batches=batches,
        modes=["eager"] + ["compile"] * recipe.compile + ["deepcache"] * recipe.deepcache,
        device=device,
        precision=recipe.precision,
        mac_ratio=ratio,
        repeats=REPEATS,
        report=report,
        inputs=inputs.task.network_inputs,
    )
    return Costs([asdict(row) for row in rows], params, work, memory | {"what": what})


def described_samples(inputs: Inputs) -> dict[str, Any]:
    """How the samples were drawn."""
    settings, recipe = inputs.settings, inputs.recipe
    return {
        "count": settings.samples,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "timestep_spacing": settings.timestep_spacing
        or inputs.model.scheduler.config.get("timestep_spacing", "its own"),
        "eta": settings.eta,
        "seed": recipe.seed,
        "protocol": recipe.protocol,
        "batch": recipe.batch,
        "precision": recipe.precision,
        "fid_mode": settings.fid_mode,
    }


def write_samples(out: Path, measures: Measures, result: EvalResult, *, force: bool) -> None:
    """The samples as PNG files, one folder for each model, and the record of the run."""
    inputs = measures.inputs
    record = {
        "schema_version": SCHEMA_VERSION,
        "command": "eval",
        "recipe": inputs.recipe.document(),
        "weights": weights(inputs),
        "result": result.document(),
    }
    with staged(out, force=force) as folder:
        for role in inputs.subjects:
            (folder / role).mkdir()
            for name, content in files(role, measures.shown(role)):
                (folder / name).write_bytes(content)
        write_json(folder / "gfprune.json", record)
