"""What the dense network itself says: distances in its own features, and losses by noise level."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.finite import lost_at
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.evaluation.statistics import Features, mean_with_interval
from gfprune_cli.progress import Event, Progress
from gfprune_cli.runtime.device import Precision, autocast
from gfprune_cli.structure.trace import first_given

FEATURE_NOISE = 0.05  # of the schedule: images are little disturbed and the input is one the network knows
LOSS_DRAWS = 512
LOSS_BINS = 10
CHUNK = 32


def feature_index(process: NoisingProcess) -> int:
    return round((process.steps - 1) * FEATURE_NOISE)


def feature_layer(teacher: Any) -> str | None:
    """The layer whose features are compared: a U-Net's middle block, or what follows the last transformer
    block, which sees the tokens of the sample alone."""
    names = ("mid_block", "norm_out", "proj_out")
    return next((name for name in names if isinstance(getattr(teacher, name, None), nn.Module)), None)


def watched(teacher: Any, caught: list[torch.Tensor]) -> Any:
    """A hook that collects [n, D] features: the output [n, D, H, W] of a middle block, or the input
    [n, L, D] of a last layer."""
    name = feature_layer(teacher)
    assert name is not None
    layer = getattr(teacher, name)
    if name == "mid_block":
        return layer.register_forward_hook(
            lambda module, inputs, output: caught.append(output.float().mean((2, 3)).cpu())
        )

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(first_given(args, kwargs).float().mean(1).cpu())

    return layer.register_forward_pre_hook(keep, with_kwargs=True)


@torch.no_grad()
def teacher_features(
    teacher: Any,
    process: NoisingProcess,
    chunks: Iterable[torch.Tensor],
    *,
    conditions: Condition,
    seed: int,
    progress: Progress,
    total: int,
) -> Features:
    """[N, D] means over places of what `feature_layer` sees of slightly noisy samples.

    With guidance, of the conditional branch.

    Args:
        teacher: a network that has such a layer.
        chunks: samples [n, ...] in the network's range; sample i always gets the same noise.
        conditions: of the images.
    """
    device = next(teacher.parameters()).device
    found: list[torch.Tensor] = []
    caught: list[torch.Tensor] = []
    with watched(teacher, caught):
        done = 0
        for images in chunks:
            members = range(done, done + len(images))
            noise = [torch.randn(images.shape[1:], generator=generator(seed, "features", i)) for i in members]
            index = torch.full((len(images),), feature_index(process), device=device)
            noisy = process.add_noise(images.to(device), torch.stack(noise).to(device), index)
            chosen = None if conditions is None else conditions[list(members)].to(device)
            call(teacher, noisy, process.timesteps(index), chosen)
            found.append(caught.pop().unflatten(0, (len(images), -1))[:, -1])
            done += len(images)
            progress(Event("features", done, total))
    return torch.cat(found).double().numpy()


@dataclass(frozen=True)
class Losses:
    """Denoising losses of the same draws: `index` [N] noise levels, `model` and `reference` [N]."""

    index: np.ndarray[Any, Any]
    model: np.ndarray[Any, Any]
    reference: np.ndarray[Any, Any] | None
    steps: int

    def metrics(self) -> dict[str, dict[str, Any]]:
        found = {"loss": mean_with_interval(self.model)}
        if self.reference is not None:
            found["loss_reference"] = mean_with_interval(self.reference)
        return found

    def by_timestep(self) -> list[dict[str, Any]]:
        """Mean losses in equal ranges of the schedule, least noise first; `to` is excluded.

        None for autoencoders, which know one noise level only.
        """
        if self.steps == 1:
            return []
        edges = [round(self.steps * i / LOSS_BINS) for i in range(LOSS_BINS + 1)]
        rows = []
        for first, end in pairwise(edges):
            inside = (self.index >= first) & (self.index < end)
            if inside.any():
                reference = None if self.reference is None else float(self.reference[inside].mean())
                rows.append(
                    {
                        "from": first,
                        "to": end,
                        "loss": float(self.model[inside].mean()),
                        "loss_reference": reference,
                        "n": int(inside.sum()),
                    }
                )
        return rows


@torch.no_grad()
def denoising_losses(
    model: nn.Module,
    reference: nn.Module | None,
    process: NoisingProcess,
    draws: Draws,
    *,
    precision: Precision,
    progress: Progress,
) -> Losses:
    """Denoising loss (arXiv 2006.11239, equation 14, in the scheduler's prediction type) draw by draw.

    Raises:
        GfpruneError: a loss is not finite.
    """
    networks = {"model": model} | ({} if reference is None else {"reference": reference})
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("index", *networks)}
    for first in range(0, LOSS_DRAWS, CHUNK):
        progress(Event("loss", first, LOSS_DRAWS))
        batch = draws.batch("evaluate loss", 0, min(CHUNK, LOSS_DRAWS - first), first=first, of=LOSS_DRAWS)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        found["index"].append(batch.index.cpu())
        for name, network in networks.items():
            with autocast(noisy.device, precision):
                output = call(network, noisy, process.timesteps(batch.index), batch.condition)
            losses = process.losses(output.float(), batch.images, batch.noise, batch.index)
            found[name].append(losses.double().cpu())
    progress(Event("loss", LOSS_DRAWS, LOSS_DRAWS))
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    for name in networks:
        if not math.isfinite(float(arrays[name].sum())):
            bad = ~torch.from_numpy(arrays[name]).isfinite()
            levels = process.timesteps(torch.from_numpy(arrays["index"]))
            raise lost_at(f"the denoising loss of the {name}", bad, levels, "check the checkpoint and --data")
    return Losses(arrays["index"], arrays["model"], arrays.get("reference"), process.steps)
