"""Does the artefact compute what the source computes? Asked before anything is published."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.data.diffusion import NoisingProcess, noising_process
from gfprune_cli.data.draws import generator
from gfprune_cli.deploy.network import Signature
from gfprune_cli.errors import GateMissed, GfpruneError
from gfprune_cli.progress import Event, Report

Inputs = dict[str, torch.Tensor]
Runner = Callable[[Inputs], torch.Tensor]

COARSE = 4  # the clean images of the inputs are noise of this many cells a side, smoothed
UNKNOWN_STEPS = 1000  # length of the schedule where the scheduler does not tell

# Largest error relative to the source's largest output; docs/export.md has the measurements behind it.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Parity:
    """How far an artefact is from its source.

    Args:
        max_abs: largest absolute difference of two outputs.
        max_rel: largest difference over the largest absolute output of the source for the same sample.
        tolerance: what `max_rel` may be.
        inputs: samples compared.
        sizes: heights and widths compared.
    """

    max_abs: float | None
    max_rel: float | None
    tolerance: float
    inputs: int
    sizes: tuple[tuple[int, int], ...]


def timesteps_and_process(scheduler: Any) -> tuple[NoisingProcess | None, int]:
    """The noising process if it can be known, and the length of its schedule."""
    try:
        process = noising_process(scheduler)
    except (GfpruneError, AttributeError):  # no scheduler, or one that only its own pipeline understands
        return None, UNKNOWN_STEPS
    return process, process.steps


def draw_inputs(
    model: nn.Module, scheduler: Any, signature: Signature, *, free_size: bool, seed: int
) -> list[Inputs]:
    """Inputs at the lowest, the middle and the highest noise level.

    One batch of one for each level and one of three with all levels; where height and width are free, the
    latter once more in another size. Noisy samples are smooth random images plus noise, as the scheduler
    mixes them; every tensor is drawn from (seed, batch, size).
    """
    process, steps = timesteps_and_process(scheduler)
    network: Any = model
    if network.config.time_embedding_type == "learned":
        steps = min(steps, network.config.num_train_timesteps)
    levels = (0, (steps - 1) // 2, steps - 1)
    height, width = signature.inputs["sample"].shape[2:]
    wider = width + signature.factor
    batches = [([level], (height, width)) for level in levels] + [(list(levels), (height, width))]
    batches += [(list(levels), (height, wider))] if free_size else []
    return [
        one_batch(signature, process, chosen, size, classes=network.config.num_class_embeds, seed=seed)
        for chosen, size in batches
    ]


def one_batch(
    signature: Signature,
    process: NoisingProcess | None,
    levels: Sequence[int],
    size: tuple[int, int],
    *,
    classes: int | None,
    seed: int,
) -> Inputs:
    """A noisy batch at positions `levels` of the schedule."""
    source = generator(seed, "export", *levels, *size)
    index = torch.tensor(levels)
    template = signature.inputs["sample"]
    noise = torch.randn(len(index), template.shape[1], *size, generator=source)
    times = index
    if process is not None:
        low, high = process.value_range
        coarse = torch.rand(len(index), template.shape[1], COARSE, COARSE, generator=source)
        images = nn.functional.interpolate(coarse, size=size, mode="bilinear") * (high - low) + low
        noise, times = process.add_noise(images, noise, index), process.timesteps(index)
    inputs = {"sample": noise, "timestep": times.to(signature.inputs["timestep"].dtype)}
    if "class_labels" in signature.inputs:
        label = signature.inputs["class_labels"]
        shape = (len(index), *label.shape[1:])
        inputs["class_labels"] = (
            torch.rand(shape, generator=source)
            if label.is_floating_point()
            else torch.randint(classes or 1, shape, generator=source)
        )
    return inputs


@torch.no_grad()
def compare(
    source: Runner, artefact: Runner, batches: Sequence[Inputs], tolerance: float, report: Report
) -> Parity:
    """Run both networks on every batch.

    Raises:
        GateMissed: the error is above the tolerance, or an output is not finite.
    """
    absolute = relative = 0.0
    count = sum(len(batch["sample"]) for batch in batches)
    done = 0
    for batch in batches:
        report(Event("verify", done, count))
        expected, found = source(batch).double(), artefact(batch).double()
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            raise GateMissed(
                "the export's output is not finite, or not of the source's shape "
                f"({list(found.shape)} for {list(expected.shape)}): nothing was written; use a wider --dtype"
            )
        difference = (found - expected).flatten(1).abs().amax(1)
        peak = expected.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        absolute = max(absolute, float(difference.max()))
        relative = max(relative, float((difference / peak).max()))
        done += len(batch["sample"])
    report(Event("verify", count, count, values={"max_abs": absolute, "max_rel": relative}))
    if relative > tolerance:
        raise GateMissed(
            f"the export is off by {relative:.3g} of the source's largest output, and --tolerance is "
            f"{tolerance:g}: nothing was written; use a wider --dtype, or a larger --tolerance"
        )
    return Parity(absolute, relative, tolerance, count, sizes_of(batches))


def sizes_of(batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[tuple[int, int], ...]:
    """Every (height, width) among the batches, once."""
    sizes = {(int(batch["sample"].shape[2]), int(batch["sample"].shape[3])) for batch in batches}
    return tuple(sorted(sizes))
