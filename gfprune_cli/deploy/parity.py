"""Does the artefact compute what the source computes? Asked before anything is published."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.deploy.signature import MASK, TIMESTEP, Signature, larger, signature_of
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.schedulers import NoisingProcess, noising_process
from gfprune_cli.errors import GateMissed, GfpruneError
from gfprune_cli.families.table import family_of
from gfprune_cli.inputs.unknown_classes import RecordedNetwork
from gfprune_cli.progress import Event, Progress

Inputs = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
Runner = Callable[[Inputs], Outputs]

POSITIONS = 64  # image ids and sizes are numbers below
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
        sizes: heights and widths compared; of samples of another layout all dimensions but the batch.
    """

    max_abs: float | None
    max_rel: float | None
    tolerance: float
    inputs: int
    sizes: tuple[tuple[int, ...], ...]


def timesteps_and_process(scheduler: Any) -> tuple[NoisingProcess | None, int]:
    """The noising process if it can be known, and the length of its schedule."""
    try:
        process = noising_process(scheduler)
    except (GfpruneError, AttributeError):  # no scheduler, or one that only its own pipeline understands
        return None, UNKNOWN_STEPS
    return process, process.steps


def draw_inputs(
    network: Any, scheduler: Any, signature: Signature, *, free: frozenset[str], seed: int
) -> list[Inputs]:
    """Inputs at the lowest, the middle and the highest noise level.

    One batch of one for each level and one of three with all levels; where sizes are free, the latter once
    more in other ones. Noisy images are smooth random images plus noise, as the scheduler mixes them; every
    tensor is drawn from (seed, batch, size).

    Args:
        free: the sizes (fields of `Sizes`) that are free.
    """
    process, steps = timesteps_and_process(scheduler)
    if network.config.get("time_embedding_type") == "learned":
        steps = min(steps, network.config.num_train_timesteps)
    levels = (0, (steps - 1) // 2, steps - 1)
    together = (levels[1],) * 3 if signature.one_time else levels
    batches = [((level,), signature) for level in levels] + [(together, signature)]
    if free:
        grown = larger(signature.sizes, *(free - {"height"}), factor=signature.factor)
        batches.append((together, signature_of(network, scheduler, grown, one_time=signature.one_time)))
    return [one_batch(network, made, process, chosen, seed) for chosen, made in batches]


def one_batch(
    network: Any, signature: Signature, process: NoisingProcess | None, levels: Sequence[int], seed: int
) -> Inputs:
    """A noisy batch at positions `levels` of the schedule."""
    template = signature.inputs[signature.sample]
    source = generator(seed, "export", *levels, *template.shape[2:])
    index, count = torch.tensor(levels), len(levels)
    noise = torch.randn(count, *template.shape[1:], generator=source)
    times = index
    if process is not None:
        images = smooth_images(noise, process, source)
        noise, times = process.add_noise(images, noise, index), process.timesteps(index)
    known = isinstance(network, RecordedNetwork)
    family = family_of(network)
    factor = network.time_factor if known else 1 if family is None else family.time_factor
    times = times if factor == 1 else times * factor
    found = {}
    for name, tensor in signature.inputs.items():
        shape = tensor.shape if name in signature.shared else (count, *tensor.shape[1:])
        if name == signature.sample:
            found[name] = noise
        elif name == TIMESTEP:
            found[name] = (times[0] if signature.one_time else times).to(tensor.dtype)
        elif known:
            found[name] = tensor.expand(shape).contiguous()
        else:
            found[name] = random_input(name, tensor, shape, network, source)
    return found


def smooth_images(like: torch.Tensor, process: NoisingProcess, source: torch.Generator) -> torch.Tensor:
    """Random images in the range of the process; samples of another layout are uniform noise."""
    low, high = process.value_range
    if like.ndim != 4:
        return torch.rand(like.shape, generator=source) * (high - low) + low
    coarse = torch.rand(*like.shape[:2], COARSE, COARSE, generator=source)
    return nn.functional.interpolate(coarse, size=like.shape[2:], mode="bilinear") * (high - low) + low


def random_input(
    name: str, template: torch.Tensor, shape: Sequence[int], network: Any, source: torch.Generator
) -> torch.Tensor:
    """What a network is given beside samples: classes, masks of the first tokens, positions, states."""
    if not template.is_floating_point():
        classes = network.config.get("num_class_embeds") or network.config.get("num_embeds_ada_norm") or 1
        return torch.randint(classes, tuple(shape), generator=source, dtype=template.dtype)
    if name == MASK:
        kept = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=source)
        return (torch.arange(shape[1]) < kept).to(template.dtype)
    if name.endswith("_ids"):
        return torch.randint(POSITIONS, tuple(shape), generator=source).to(template.dtype)
    return torch.rand(tuple(shape), generator=source)


@torch.no_grad()
def compare(
    source: Runner, artefact: Runner, batches: Sequence[Inputs], tolerance: float, progress: Progress
) -> Parity:
    """Run both networks on every batch.

    Raises:
        GateMissed: the error is above the tolerance, or an output is not finite.
    """
    absolute = relative = 0.0
    count = sum(len(samples_of(batch)) for batch in batches)
    done = 0
    for batch in batches:
        progress(Event("verify", done, count))
        for expected, found in zip(source(batch), artefact(batch), strict=True):
            distance = difference(expected.double(), found.double())
            absolute, relative = max(absolute, distance[0]), max(relative, distance[1])
        done += len(samples_of(batch))
    progress(Event("verify", count, count, values={"max_abs": absolute, "max_rel": relative}))
    if relative > tolerance:
        raise GateMissed(
            f"the export is off by {relative:.3g} of the source's largest output, and --tolerance is "
            f"{tolerance:g}: nothing was written; use a wider --dtype, or a larger --tolerance"
        )
    return Parity(absolute, relative, tolerance, count, sizes_of(batches))


def difference(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the largest relative to the largest entry of the same sample.

    Raises:
        GateMissed: there is none.
    """
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        raise GateMissed(
            "the export's output is not finite, or not of the source's shape "
            f"({list(found.shape)} for {list(expected.shape)}): nothing was written; use a wider --dtype"
        )
    apart = (found - expected).flatten(1).abs().amax(1)
    peak = expected.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(apart.max()), float((apart / peak).max())


def samples_of(batch: Inputs) -> torch.Tensor:
    """The noisy samples: the first input."""
    return next(iter(batch.values()))


def sizes_of(batches: Sequence[Inputs]) -> tuple[tuple[int, ...], ...]:
    """The (height, width) of the samples, or their whole shape where they are no images; each once."""
    shapes = [tuple(map(int, samples_of(batch).shape[1:])) for batch in batches]
    return tuple(sorted({shape[1:] if len(shape) == 3 else shape for shape in shapes}))
