"""One evaluation from end to end: draw from both models, compare, time, judge."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.guidance import GuidedProcess
from gfprune_cli.diffusion.schedulers import Denoiser
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.footprint import macs, peak_memory
from gfprune_cli.evaluation.inputs import Inputs
from gfprune_cli.evaluation.latency import measure_latency
from gfprune_cli.evaluation.measures import Measures
from gfprune_cli.evaluation.metrics import all_metrics
from gfprune_cli.evaluation.result import EvalResult, passed_gates, tools
from gfprune_cli.evaluation.sampling import draw, make_sampling
from gfprune_cli.evaluation.task import Task
from gfprune_cli.outputs.samples import SampleStore
from gfprune_cli.progress import Event, Progress
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.runtime.device import Precision, autocast, deterministic
from gfprune_cli.runtime.processes import Processes

REPEATS = 20  # timed passes of each network


def measured(measures: Measures, start: float) -> EvalResult:
    """All numbers, once the samples are drawn; `start` is the run's, on the monotonic clock."""
    inputs, recipe = measures.inputs, measures.inputs.recipe
    with deterministic():
        metrics = all_metrics(measures)
    costs = measure_costs(inputs, measures.networks, measures.device, measures.progress)
    return EvalResult(
        model=inputs.model.label,
        reference=inputs.reference.label if inputs.reference else None,
        component=inputs.model.component.name,
        class_name=inputs.model.component.class_name,
        samples=described_samples(inputs),
        metrics=metrics,
        loss_by_timestep=measures.losses.by_timestep(),
        bytes={
            "model": inputs.model.component.bytes,
            "reference": inputs.reference.component.bytes if inputs.reference else None,
        },
        gates=passed_gates(recipe, metrics, costs["latency"]),
        warnings=inputs.remarks.texts,
        fold=inputs.model.fold,
        device=str(measures.device),
        tools=tools(),
        recipe=recipe.document(),
        seconds=round(time.monotonic() - start, 3),
        grid=measures.grid(),
        **costs,
    )


def draw_all(
    inputs: Inputs,
    networks: Mapping[str, nn.Module],
    store: SampleStore,
    processes: Processes,
    progress: Progress,
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
                tick = partial(progress, Event("sample", done, total))
                return draw(
                    sampling,
                    denoiser(networks[role], chosen, task, inputs.recipe.precision, tick),
                    members=members,
                    shape=task.shape,
                    seed=inputs.recipe.seed,
                    device=processes.device,
                    what=inputs.subjects[role].label,
                    given=None if starts is None else starts[torch.tensor(members)],
                    precision=inputs.recipe.precision,
                )

            store.put(role, chunk, in_parts(draw_some, members))
        done += len(members)
        progress(Event("sample", done, total))


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


def denoiser(
    network: nn.Module, condition: Condition, task: Task, precision: Precision, tick: Callable[[], object]
) -> Denoiser:
    """(noisy images, timesteps) -> what a sampler follows: the network's output, guided."""

    def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        tick()
        with autocast(x.device, precision):
            output = call(network, x, timesteps, condition).float()
        return task.process.guided(output) if isinstance(task.process, GuidedProcess) else output

    return denoise


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
    inputs: Inputs, networks: Mapping[str, nn.Module], device: torch.device, progress: Progress
) -> dict[str, Any]:
    """How large, and unless `--no-latency` how fast: both networks in one interleaved run.

    Returns:
        The fields `latency`, `params`, `macs` and `memory` of the result.
    """
    recipe, task = inputs.recipe, inputs.task
    batches = latency_batches(recipe)

    def of_both(measure: Callable[[nn.Module], int | None]) -> dict[str, Any]:
        found = {role: networks.get(role) for role in ("model", "reference")}
        return {role: None if network is None else measure(network) for role, network in found.items()}

    params = of_both(lambda network: sum(parameter.numel() for parameter in network.parameters()))
    work = of_both(lambda network: macs(network, task.sample_inputs))
    memory, rows = of_both(lambda network: None), []
    if not recipe.no_latency:
        memory = of_both(
            lambda network: peak_memory(
                network,
                batch=batches[-1],
                device=device,
                precision=recipe.precision,
                progress=progress,
                inputs=task.network_inputs,
            )
        )
        rows = measure_latency(
            networks["model"],
            networks.get("reference"),
            batches=batches,
            modes=["eager"] + ["compile"] * recipe.compile + ["deepcache"] * recipe.deepcache,
            device=device,
            precision=recipe.precision,
            mac_ratio=work["reference"] / work["model"] if work["reference"] and work["model"] else None,
            repeats=REPEATS,
            progress=progress,
            inputs=task.network_inputs,
        )
    memory["what"] = (
        f"most bytes of tensors held at once in one forward pass of {batches[-1]} images, weights included"
    )
    return {"latency": [asdict(row) for row in rows], "params": params, "macs": work, "memory": memory}


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
