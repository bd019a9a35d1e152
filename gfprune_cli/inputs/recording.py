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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gfprune_cli.diffusion.conditions import Conditions
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.guidance_fit import Guidance, fit_guidance, fit_time
from gfprune_cli.inputs.observer import Enough, Observer
from gfprune_cli.inputs.pipeline import quiet
from gfprune_cli.inputs.refusals import not_run
from gfprune_cli.inputs.rows import check_shared, flattened, own_row, shared_values, stacked
from gfprune_cli.progress import Event, Progress, silent

STEPS = 4  # that the pipeline is asked for; it comes to the second
TIMESTEP_NAMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class PipelineOptions:
    """What users may ask of a pipeline; None for its own default.

    Args:
        prompts: text file, one per line; None for the built-in ones.
        size: of drawn images in pixels, "512" or "512x768" (height x width).
        frames: of drawn videos.
        guidance: scale; 1 switches it off.
    """

    prompts: str | None = None
    size: str | None = None
    frames: int | None = None
    guidance: float | None = None

    @staticmethod
    def of(recipe: Any) -> "PipelineOptions":
        return PipelineOptions(recipe.prompts, recipe.size, recipe.frames, recipe.guidance)

    def pixels(self) -> tuple[int, int] | None:
        """(height, width) of `size`.

        Raises:
            UsageError: it is no size.
        """
        if self.size is None:
            return None
        parts = self.size.lower().split("x")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
            raise UsageError(f"--size {self.size}: give pixels, such as 512, or height x width: 512x768")
        height, width = int(parts[0]), int(parts[-1])
        if min(height, width) < 1:
            raise UsageError(f"--size {self.size}: must be at least 1")
        return height, width


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
    asked: Sequence[str] | Sequence[int],
    options: PipelineOptions,
    progress: Progress = silent,
) -> Recording:
    """Run a pipeline once per prompt, up to its first call of the network.

    Args:
        pipeline: from `data.pipeline.open_pipeline`, around `network`.
        asked: prompts, or class labels where the pipeline takes those.

    Raises:
        UsageError: the pipeline cannot do what `options` ask for.
        GfpruneError: the pipeline needs more than prompts, or does something that no recording can hold.
    """
    observer = Observer(network, pipeline.scheduler)
    arguments = call_arguments(pipeline, options)
    with quiet(), observer.watching(pipeline), torch.no_grad():
        run_pipeline(pipeline, observer, arguments, asked[:1], None)
        guidance, time = conventions(pipeline, observer, options)
        sample, timestep = argument_names(network, observer.calls[0])
        shape = tuple(observer.calls[0][sample].shape[1:])
        count, mu, image = observer.first, observer.mu, observer.image
        left_out = {sample, timestep}
        single = [flattened(call, left_out) for call in observer.calls[:count]]
        own = per_sample_names(pipeline, observer, arguments, asked[0], single, left_out)
        rows, shared = [own_row(single, own)], shared_values(single, own)
        for number, ask in enumerate(asked[1:], 1):
            progress(Event("encode", number, len(asked)))
            run_pipeline(pipeline, observer, arguments, [ask], count)
            calls = [flattened(call, left_out) for call in observer.calls]
            rows.append(own_row(calls, own))
            check_shared(pipeline, shared, shared_values(calls, own))
    progress(Event("encode", len(asked), len(asked)))
    tensors = stacked(rows)
    if guidance.order == (1, 0):
        tensors = {name: tensor.flip(1) for name, tensor in tensors.items()}
    conditions = Conditions(
        tensors,
        shared,
        sample,
        timestep,
        len(guidance.order),
        guidance.scale,
        *time,
        guidance.sign,
        None if tensors else tuple(range(len(asked))),
    )
    return Recording(conditions, shape, image, mu, guidance.remarks)


def call_arguments(
    pipeline: Any, options: PipelineOptions, *, steps: int = STEPS, output: str = "latent"
) -> dict[str, Any]:
    """What the pipeline is called with, beside the prompt and the generator.

    Raises:
        UsageError: an option that it does not have; GfpruneError: it needs something else than prompts.
    """
    name = type(pipeline).__name__
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": steps, "output_type": output}
    given["use_resolution_binning"] = False  # the size asked for, not the nearest of a list
    made = {key: value for key, value in given.items() if key in parameters}
    size = options.pixels()
    wanted: dict[str, dict[str, Any]] = {
        "--size": {} if size is None else {"height": size[0], "width": size[1]},
        "--frames": {} if options.frames is None else {"num_frames": options.frames},
        "--guidance": {} if options.guidance is None else {"guidance_scale": options.guidance},
    }
    for flag, values in wanted.items():
        if not values.keys() <= parameters.keys():
            raise UsageError(f"{flag}: {name} has no such setting; drop the flag")
        made |= values
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and key not in {"self", "prompt", "class_labels", *made}:
            raise GfpruneError(f"{name} needs {key}, which gfprune cannot make up: name another --component")
    return made


def run_pipeline(
    pipeline: Any, observer: Observer, arguments: dict[str, Any], asked: Sequence[Any], limit: int | None
) -> None:
    """Call the pipeline for some prompts until `observer` has seen enough.

    Raises:
        GfpruneError: the pipeline fails, or never calls the network.
    """
    observer.forget(limit)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    made = dict(arguments)
    for key in ("prompt", "class_labels"):
        if key in parameters:
            made[key] = list(asked)
            break
    if "generator" in parameters:
        made["generator"] = [generator(0, "recording", number) for number in range(len(asked))]
    if len(asked) == 1 and "generator" in made:
        made["generator"] = made["generator"][0]
    try:
        pipeline(**made)
    except Enough:
        pass
    except GfpruneError:
        raise
    except Exception as error:  # another library's pipeline: anything
        raise not_run(pipeline, observer.network, made, error) from error
    if not observer.calls:
        raise GfpruneError(
            f"{type(pipeline).__name__} never calls its {type(observer.network).__name__}:"
            " name another --component"
        )


def conventions(
    pipeline: Any, observer: Observer, options: PipelineOptions
) -> tuple[Guidance, tuple[float, float]]:
    """How the pipeline combines branches, and what it tells the network about the noise level."""
    name = type(pipeline).__name__
    if not observer.steps:
        raise GfpruneError(f"{name} does not step its scheduler: gfprune cannot tell its noise levels")
    sample, timestep = argument_names(observer.network, observer.calls[0])
    calls, step = observer.calls[: observer.first], observer.steps[0]
    branches = sum(len(call[sample]) for call in calls)
    if branches > 2:
        raise GfpruneError(f"{name} guides with {branches} branches: switch it off with --guidance 1")
    own = calls[0][sample][0].numel()
    if step["sample"].numel() not in (own, own * branches):
        raise GfpruneError(f"{name} gives its network more than noisy samples, which gfprune cannot make up")
    nominal = options.guidance
    if nominal is None:
        parameters = inspect.signature(type(pipeline).__call__).parameters
        default = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
        nominal = float(default) if isinstance(default, int | float) else None
    outputs = torch.cat(observer.outputs[: observer.first])
    guidance = fit_guidance(outputs, step["model_output"], calls[0][sample], nominal, name)
    pairs = [
        (float(taken["timestep"]), float(observer.calls[taken["calls"] - 1][timestep].flatten()[0]))
        for taken in observer.steps
    ]
    return guidance, fit_time(pairs, pipeline.scheduler.config.get("num_train_timesteps") or 1000)


def argument_names(network: Any, call: dict[str, Any]) -> tuple[str, str]:
    """Names of the noisy sample and of the noise level."""
    sample = next(iter(call))
    timestep = next((name for name in TIMESTEP_NAMES if isinstance(call.get(name), torch.Tensor)), None)
    if not isinstance(call[sample], torch.Tensor) or timestep is None:
        raise GfpruneError(
            f"{type(network).__name__} takes no batch of samples with their timesteps: gfprune cannot call it"
        )
    return sample, timestep


def per_sample_names(
    pipeline: Any,
    observer: Observer,
    arguments: dict[str, Any],
    ask: Any,
    single: list[dict[str, Any]],
    left_out: set[str],
) -> set[str]:
    """Arguments that grow with the batch: seen by asking for the same thing twice."""
    run_pipeline(pipeline, observer, arguments, [ask, ask], 1)
    double, found = flattened(observer.calls[0], left_out), set()
    for name, value in single[0].items():
        leaves = pytree.tree_leaves(value)
        others = pytree.tree_leaves(double.get(name))
        grown = [
            isinstance(one, torch.Tensor) and one.ndim > 0 and len(other) == 2 * len(one)
            for one, other in zip(leaves, others, strict=False)
            if isinstance(other, torch.Tensor) and other.ndim > 0
        ]
        if any(grown):
            if not isinstance(value, torch.Tensor):
                raise GfpruneError(
                    f"{type(pipeline).__name__} passes {name} as a list of tensors: gfprune cannot keep it"
                )
            found.add(name)
    return found


def with_rows(recording: Recording, rows: Sequence[int]) -> Conditions:
    """Conditions of samples, sample i asked for with number `rows[i]`."""
    return replace(recording.conditions, rows=tuple(rows))
