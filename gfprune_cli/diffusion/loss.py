"""The denoising loss of a network over fixed draws: the number that every command reports."""

import math
from collections.abc import Callable
from typing import Any

import torch

from gfprune_cli.diffusion.conditions import Condition, inputs_of
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.finite import lost_at
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.progress import Event, Progress
from gfprune_cli.runtime.processes import ALONE, Processes, agree

REPORT_DRAWS = 512  # noisy samples behind each reported loss
CHUNK = 32
REMEDY = "check the checkpoint and --data; what was trained needs a lower --learning-rate"
Network = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]


def one_sample(process: NoisingProcess, draws: Draws) -> dict[str, Any]:
    """Keyword arguments of a network for one noisy sample, its branches included."""
    batch = draws.batch("one sample", 0, 1)
    noisy = process.add_noise(batch.images, batch.noise, batch.index)
    inputs = inputs_of(noisy, process.timesteps(batch.index), batch.condition)
    return {name: value for name, value in inputs.items() if name != "return_dict"}


def denoising_loss(
    network: Network,
    process: NoisingProcess,
    draws: Draws,
    count: int,
    progress: Progress,
) -> float:
    """Mean denoising loss over `count` draws; see `losses_of_draws`."""
    return float(losses_of_draws(network, process, draws, count, progress).mean())


@torch.no_grad()
def losses_of_draws(
    network: Network,
    process: NoisingProcess,
    draws: Draws,
    count: int,
    progress: Progress,
    at_once: int = CHUNK,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """[count] float64 denoising losses of draws that are stratified over the whole noise schedule.

    Args:
        network: (noisy images [N, ...], timesteps [N], their condition) -> output.
        draws: where images and noise come from; equal draws at every call.
        at_once: samples that go through the network together.
        processes: that share the draws.

    Raises:
        GfpruneError: the loss is not finite; names the timesteps.
    """
    own = processes.share(count)
    taken = [torch.zeros(0, device=draws.device or draws.images.device)]
    for first in range(own.start, own.stop, at_once):
        progress(Event("evaluate", first, count))
        batch = draws.batch("report", 0, min(at_once, own.stop - first), first=first, of=count)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        output = network(noisy, process.timesteps(batch.index), batch.condition)
        taken.append(process.losses(output.float(), batch.images, batch.noise, batch.index))
    losses = processes.joined(torch.cat(taken).double())
    if processes.count > 1:
        agree(progress)
    if not math.isfinite(float(losses.sum())):
        levels = process.timesteps(draws.batch("report", 0, count).index)
        raise lost_at("a reported loss", ~losses.isfinite(), levels, REMEDY)
    return losses
