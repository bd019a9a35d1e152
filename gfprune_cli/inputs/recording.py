"""What a pipeline passes to its denoiser: recorded from one run of the pipeline itself.

    recording = record(pipeline, network, ["a red fox"], PipelineOptions())
    output = call(network, noisy, timesteps, recording.conditions)

Nothing here knows a family. The pipeline is called as its users call it; the network is replaced by a
stand-in that answers with noise, and the run ends before the second step. From what went in and what the
scheduler was given follow the conditioning, the branches of guidance and its scale, the layout of the latents
and what the network is told about the noise level.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Conditions
from gfprune_cli.diffusion.schedulers import noise_level
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.arguments import Names, argument_names
from gfprune_cli.inputs.guidance_fit import Guidance, fit_guidance, fit_time, one_branch
from gfprune_cli.inputs.joined import Joined, as_batch, find_joined, whole_sample
from gfprune_cli.inputs.observer import Adding, Observer
from gfprune_cli.inputs.pictures import Pictures
from gfprune_cli.inputs.pipeline import quiet
from gfprune_cli.inputs.pipeline_run import PipelineOptions, PipelineRun
from gfprune_cli.inputs.rows import DifferentLengths, stacked
from gfprune_cli.progress import Event, Progress, silent


@dataclass(frozen=True)
class Recording:
    """What one pipeline passes to its denoiser.

    Args:
        conditions: one row per prompt (or class), on the CPU, in the type in which they were passed.
        shape: of one sample as the network sees it, without the batch dimension.
        image: (height, width, frames) in pixels that the pipeline works at; 0 for what it does not have.
        mu: the scheduler's dynamic shift; None if it has none.
        remarks: what the user should know.
    """

    conditions: Conditions
    shape: tuple[int, ...]
    image: tuple[int, int, int] = (0, 0, 0)
    mu: float | None = None
    remarks: tuple[str, ...] = ()


def record(
    pipeline: Any,
    network: nn.Module,
    asked: Sequence[Any],
    options: PipelineOptions,
    progress: Progress = silent,
    pictures: Pictures | None = None,
    scheduler_name: str = "scheduler",
    adding: Adding | None = None,
) -> Recording:
    """Run a pipeline once per prompt, up to its first call of the network.

    Args:
        pipeline: from `inputs.pipeline.open_pipeline`, around `network`.
        asked: prompts, class labels where the pipeline takes those, or None for each picture.
        pictures: for pipelines that want some; picture i goes with entry i of `asked`.
        scheduler_name: of the pipeline's schedulers, the network's own.
        adding: see `Observer`.

    Raises:
        UsageError: the pipeline cannot do what `options` ask for.
        GfpruneError: the pipeline needs more than prompts, or does something that no recording can hold.
    """
    run = PipelineRun(
        pipeline,
        Observer(network, getattr(pipeline, scheduler_name), adding),
        options,
        pictures or Pictures(),
        list(asked),
    )
    observer = run.observer
    with quiet(), observer.watching(pipeline), torch.no_grad():
        run.first()
        guidance, time, joined = conventions(pipeline, observer, options)
        count, mu, image = observer.first, observer.mu, observer.image
        calls = [observer.calls[:count]]
        names = Names.of(run, joined)
        for number in range(1, len(asked)):
            progress(Event("encode", number, len(asked)))
            run(number, limit=count)
            calls.append(observer.calls)
    progress(Event("encode", len(asked), len(asked)))
    try:
        rows = [names.row(one, guidance.order) for one in calls]
    except DifferentLengths:
        guidance = one_branch(guidance)
        rows = [names.row(one, guidance.order) for one in calls]
    shared = [names.shared(one, guidance.order[-1]) for one in calls]
    tensors, common = stacked(rows, shared, type(pipeline).__name__)
    conditions = Conditions(
        tensors,
        common,
        names.sample,
        names.timestep,
        len(guidance.order),
        guidance.scale,
        *time,
        guidance.sign,
        None if tensors else tuple(range(len(asked))),
        joined.axis,
        tuple(sorted(names.lists)),
        names.twins,
        calls[0][0][names.timestep].is_floating_point(),
    )
    return Recording(conditions, joined.shape, image, mu, guidance.remarks)


def conventions(
    pipeline: Any, observer: Observer, options: PipelineOptions
) -> tuple[Guidance, tuple[float, float], Joined]:
    """How the pipeline combines branches, what it tells its network about noise, and what it joins to it."""
    name = type(pipeline).__name__
    if not observer.steps:
        raise GfpruneError(f"{name} does not step its scheduler: gfprune cannot tell its noise levels")
    sample, timestep = argument_names(observer.network, observer.calls[0])
    calls, step = observer.calls[: observer.first], observer.steps[0]
    given = as_batch(calls[0][sample])
    joined = find_joined(given, step["sample"], sum(len(call[sample]) for call in calls))
    if joined is None and observer.outputs[0].shape[1:] == given.shape[1:]:  # first frames among noisy ones
        joined = whole_sample(given)
    if joined is None:
        raise GfpruneError(f"{name} gives its network more than noisy samples, which gfprune cannot make up")
    nominal = options.guidance
    if nominal is None:
        parameters = inspect.signature(type(pipeline).__call__).parameters
        default = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
        nominal = float(default) if isinstance(default, int | float) else None
    outputs = torch.cat([joined.output(output, given) for output in observer.outputs[: observer.first]])
    guidance = fit_guidance(outputs, step["model_output"], joined.own(given), nominal, name)
    pairs = [
        (
            noise_level(observer.scheduler, float(taken["timestep"])),
            float(observer.calls[taken["calls"] - 1][timestep].max()),
        )
        for taken in observer.steps
    ]
    time = fit_time(pairs, observer.scheduler.config.get("num_train_timesteps") or 1000)
    return guidance, time, joined
