"""Samples that a network draws of itself, and what they need to know of its configuration."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import first_line, read_config
from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.finite import cause
from gfprune_cli.diffusion.process import NoisingProcess
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.progress import Event, Progress
from gfprune_cli.runtime.device import out_of_memory
from gfprune_cli.runtime.processes import ALONE, Processes, agree

SAMPLE_BATCH = 32


def draw_labels(classes: int | None, count: int, seed: int) -> torch.Tensor | None:
    """[count] class labels for a class-conditional network, uniform; None for an unconditional one."""
    if classes is None:
        return None
    return torch.randint(classes, (count,), generator=generator(seed, "labels"))


def refuse_options(options: PipelineOptions, component: Component) -> None:
    """No pipeline conditions this network, so there is nothing to ask of one.

    Raises:
        UsageError: an option was given.
    """
    for name in ("prompts", "size", "frames", "guidance"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name}: {component.class_name} without a pipeline that conditions it has no such setting;"
                " drop the flag"
            )


def upscaling(component: Component, name: str) -> int:
    """Pixels per latent, each way, by the configuration of a pipeline's autoencoder."""
    config = read_config(component.root / name / "config.json", component.roots)
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
    return int(2 ** (len(stages) - 1))


def image_size(component: Component, config: Any) -> tuple[int, int]:
    """(height, width) of what the network denoises.

    Raises:
        GfpruneError: the configuration does not say, or wants conditioning that cannot be drawn.
    """
    if config.sample_size is None:
        raise GfpruneError(f"{component.folder}/config.json has no sample_size: add it")
    if getattr(config, "class_embed_type", None) is not None:
        raise GfpruneError(
            f"{component.folder}/config.json: class_embed_type {config.class_embed_type} needs"
            " conditioning that gfprune cannot draw; it prunes unconditional and class-label networks"
        )
    size = config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def image_noise(shape: tuple[int, ...], seed: int, members: Sequence[int]) -> torch.Tensor:
    """[N, *shape] standard normal noise that images come from, by their numbers: each has its own seed."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "image", index)) for index in members])


@torch.no_grad()
def self_images(
    model: nn.Module,
    process: NoisingProcess,
    *,
    count: int,
    steps: int,
    seed: int,
    conditions: Condition,
    shape: tuple[int, ...],
    device: torch.device,
    progress: Progress,
    batch: int = SAMPLE_BATCH,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """[count, *shape] samples of the model, from a few deterministic steps; every image has its own seed.

    Args:
        processes: that draw a share each; all of them get all.

    Raises:
        GfpruneError: the model's samples are not finite.
    """
    own = processes.share(count)
    images = [torch.empty(0, *shape)]
    for first in range(own.start, own.stop, batch):
        members = range(first, min(own.stop, first + batch))
        noise = image_noise(shape, seed, members)
        chosen = None if conditions is None else conditions[list(members)].to(device)

        def denoise(
            x: torch.Tensor, timesteps: torch.Tensor, chosen: Condition = chosen, done: int = first
        ) -> torch.Tensor:
            progress(Event("calibrate", done, count))
            try:
                return call(model, x, timesteps, chosen)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # the network's own code
                if out_of_memory(error):
                    raise
                raise GfpruneError(
                    f"{type(model).__name__} fails on a batch of {len(x)}: {first_line(error)}"
                ) from error

        images.append(process.sample(denoise, noise.to(device), steps).cpu())
        if not bool(images[-1].isfinite().all()):
            why = cause(partial(process.sample, noise=noise.to(device), steps=steps), denoise)
            raise GfpruneError(f"images drawn from the model are not finite: {why}")
    progress(Event("calibrate", count, count))
    if processes.count > 1:
        agree(progress)
    return processes.joined(torch.cat(images))
