"""Calibration images: from the user's data, or drawn from the model itself so that none is needed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gfprune_cli.checkpoint.durable import write_tensors
from gfprune_cli.checkpoint.reader import Component
from gfprune_cli.data.conditions import Condition, call
from gfprune_cli.data.diffusion import NoisingProcess, noising_process
from gfprune_cli.data.draws import generator
from gfprune_cli.data.images import fingerprint, load_images, to_model_range
from gfprune_cli.errors import GfpruneError, UsageError
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


@dataclass(frozen=True)
class Images:
    """`images` [N, ...] as the network sees them, their `conditions`, the noise `process` that goes with
    both, and the `fingerprint` of data given."""

    images: torch.Tensor
    conditions: Condition
    fingerprint: str | None
    process: NoisingProcess


@dataclass(frozen=True)
class ImageRequest:
    """Which images a run works on.

    Args:
        data: what the user gave; None to draw images from the model.
        count: images to draw, or the most to take from `data`.
        sample_steps: sampling steps of a drawn image.
        seed: of the run.
    """

    data: str | None
    count: int
    sample_steps: int
    seed: int

    def answer(
        self,
        model: nn.Module,
        component: Component,
        scheduler: Any,
        hashes: Mapping[str, str],
        report: Report,
    ) -> Images:
        """The images: read from the user's data, or drawn from `model` (once; they are cached).

        Args:
            component, hashes: what `model` was loaded from, and the hashes of its weight files.
            scheduler: of the pipeline.

        Raises:
            UsageError: data that does not fit the network; GfpruneError: the network cannot be sampled.
        """
        config: Any = model.config
        height, width = image_size(component, config)
        process = noising_process(scheduler)
        if self.data is not None:
            refuse_latent_data(self.data, component)
            loaded = load_images(
                self.data,
                size=(height, width),
                channels=config.in_channels,
                limit=self.count,
                seed=self.seed,
                report=report,
            )
            if len(loaded) < 2:
                raise UsageError(f"--data {self.data} holds {len(loaded)} image: at least 2 are needed")
            low, high = process.value_range
            images = (to_model_range(loaded) + 1) * ((high - low) / 2) + low
            return Images(
                images,
                draw_labels(config.num_class_embeds, len(images), self.seed),
                fingerprint(loaded),
                process,
            )
        labels = draw_labels(config.num_class_embeds, self.count, self.seed)
        device = next(model.parameters()).device
        key = {
            "weights": dict(hashes),
            "config": {key: value for key, value in dict(config).items() if not key.startswith("_")},
            "scheduler": dict(scheduler.config),
            "images": self.count,
            "steps": self.sample_steps,
            "seed": self.seed,
            "device": device.type,
        }
        images = cached(
            {name: repr(value) for name, value in key.items()},
            lambda: self_images(
                model,
                process,
                count=self.count,
                steps=self.sample_steps,
                seed=self.seed,
                labels=labels,
                shape=(config.in_channels, height, width),
                device=device,
                report=report,
            ),
            report,
        )
        return Images(images, labels, None, process)


def image_size(component: Component, config: Any) -> tuple[int, int]:
    """(height, width) of what the network denoises.

    Raises:
        GfpruneError: the configuration does not say, or wants conditioning that cannot be drawn.
    """
    if config.sample_size is None:
        raise GfpruneError(f"{component.folder}/config.json has no sample_size: add it")
    if config.class_embed_type is not None:
        raise GfpruneError(
            f"{component.folder}/config.json: class_embed_type {config.class_embed_type} needs"
            " conditioning that gfprune cannot draw; it prunes unconditional and class-label networks"
        )
    size = config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def refuse_latent_data(data: str, component: Component) -> None:
    """Pixels are no input for a network that works on latents."""
    decoders = {"vae", "vqvae"} & set(component.pipeline or {})
    if decoders:
        raise UsageError(
            f"--data {data}: this pipeline works on latents of its {decoders.pop()}; "
            "drop --data to calibrate on latents drawn from the model"
        )


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
