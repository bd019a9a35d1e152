"""Calibration images: from the user's data, or drawn from the model itself so that none is needed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gfprune_cli.checkpoint.durable import write_tensors
from gfprune_cli.data.diffusion import NoisingProcess
from gfprune_cli.data.draws import generator
from gfprune_cli.errors import GfpruneError
from gfprune_cli.progress import Event, Report, notice

SAMPLE_BATCH = 32


def cache_folder() -> Path:
    """`$GFPRUNE_CACHE`, else `gfprune` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GFPRUNE_CACHE") or Path(base) / "gfprune")


def draw_labels(classes: int | None, count: int, seed: int) -> torch.Tensor | None:
    """[count] class labels for a class-conditional network, uniform; None for an unconditional one."""
    if classes is None:
        return None
    return torch.randint(classes, (count,), generator=generator(seed, "labels"))


@torch.no_grad()
def self_images(
    model: nn.Module,
    process: NoisingProcess,
    *,
    count: int,
    steps: int,
    seed: int,
    labels: torch.Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
    report: Report,
) -> torch.Tensor:
    """[count, C, H, W] samples of the model, from a few deterministic steps; every image has its own seed.

    Raises:
        GfpruneError: the model's samples are not finite.
    """
    images = []
    for first in range(0, count, SAMPLE_BATCH):
        members = range(first, min(count, first + SAMPLE_BATCH))
        noise = torch.stack(
            [torch.randn(shape, generator=generator(seed, "image", index)) for index in members]
        )
        chosen = None if labels is None else labels[list(members)].to(device)

        def denoise(
            x: torch.Tensor, timesteps: torch.Tensor, chosen: torch.Tensor | None = chosen, done: int = first
        ) -> torch.Tensor:
            report(Event("calibrate", done, count))
            return call(model, x, timesteps, chosen)

        images.append(process.sample(denoise, noise.to(device), steps).cpu())
    report(Event("calibrate", count, count))
    drawn = torch.cat(images)
    if not bool(drawn.isfinite().all()):
        raise GfpruneError("images drawn from the model are not finite: pass --data, or more --sample-steps")
    return drawn


def call(
    model: nn.Module, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The network's output tensor."""
    arguments = (x, timesteps) if labels is None else (x, timesteps, labels)
    output: torch.Tensor = model(*arguments, return_dict=False)[0]
    return output


def cached(key: Mapping[str, Any], make: Callable[[], torch.Tensor], report: Report) -> torch.Tensor:
    """What `make` returns, from the cache if a run with the same key left it there.

    A cache that cannot be read or written costs time, never the run.
    """
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "calibration" / f"{digest}.safetensors"
    try:
        return load_file(path)["images"]
    except Exception:  # absent, truncated or foreign: make it again
        pass
    images = make()
    staging = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(staging, {"images": images})
        staging.replace(path)
    except OSError as error:
        notice(report, f"calibration images were not cached in {path.parent}: {error.strerror}")
        staging.unlink(missing_ok=True)
    return images
