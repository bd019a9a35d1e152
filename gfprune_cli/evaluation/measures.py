"""The metrics of an evaluation, from samples on disk."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gfprune_cli.data.images import image_batches
from gfprune_cli.data.stored import in_memory
from gfprune_cli.diffusion.conditions import Condition
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.evaluation.consistency import Consistency, unit_range
from gfprune_cli.evaluation.inputs import Inputs
from gfprune_cli.evaluation.quality import Real, distances, real_features, sample_features
from gfprune_cli.evaluation.statistics import Gaussian, frechet_distance, gaussian
from gfprune_cli.evaluation.teacher import (
    LOSS_DRAWS,
    Losses,
    denoising_losses,
    feature_index,
    feature_layer,
    teacher_features,
)
from gfprune_cli.outputs.samples import SampleStore
from gfprune_cli.progress import Progress

GRID = 16  # pairs of pictures
FEATURE_BATCH = 32
Values = dict[str, dict[str, Any]]


@dataclass
class Measures:
    """Values of the samples in a store.

    Args:
        networks: role -> network on the run's device.
    """

    inputs: Inputs
    store: SampleStore
    networks: dict[str, nn.Module]
    device: torch.device
    progress: Progress
    real: Gaussian | None = None

    def value_range(self) -> tuple[float, float]:
        """What is black and white: of the process, or for latents the range of the reference's samples."""
        if not self.inputs.model.latent:
            return self.inputs.task.plain.value_range
        role = "reference" if "reference" in self.networks else "model"
        edges = [(float(images.min()), float(images.max())) for images in self.store.images(role)]
        return min(low for low, _ in edges), max(high for _, high in edges)

    def shown(self, role: str) -> Iterator[torch.Tensor]:
        """Samples in [0, 1], chunk by chunk."""
        low, high = self.value_range()
        return (unit_range(images, low, high) for images in self.store.images(role))

    def consistency(self) -> Values:
        """SSIM and PSNR between the two models' images of the same noise."""
        if "reference" not in self.networks:
            return {}
        found = Consistency()
        for one, other in zip(self.shown("reference"), self.shown("model"), strict=True):
            found.add(one, other, eight_bit=self.inputs.pictures)
        if len(self.inputs.task.shape) != 3:
            images = self.store.images
            for one, other in zip(images("reference"), images("model"), strict=True):
                found.add_relative(one, other)
        return found.metrics()

    def quality(self) -> Values:
        """Distances to real images in the features of the extractor, of the model and of the reference."""
        inputs, extractor = self.inputs, self.inputs.extractor
        if extractor is None:
            return {}
        if inputs.statistics is not None:
            real = Real(inputs.statistics, None)
        else:
            real = real_features(
                str(inputs.recipe.data),
                extractor,
                size=(inputs.task.shape[1], inputs.task.shape[2]),
                channels=inputs.task.shape[0],
                progress=self.progress,
            )
        self.real = real.gaussian
        found: Values = {}
        for role, suffix in (("model", ""), ("reference", "_reference")):
            if role in self.networks:
                features = sample_features(
                    self.shown(role), extractor, inputs.settings.samples, self.progress
                )
                values = distances(features, real, extractor, inputs.recipe.seed)
                found |= {name + suffix: value for name, value in values.items()}
        dimensions = len(real.gaussian.mean)
        self.warn_of_few(extractor.fid, dimensions, inputs.settings.samples, real.gaussian.count)
        return found

    def warn_of_few(self, name: str, dimensions: int, *counts: int | None) -> None:
        """Say that a Gaussian was fitted to fewer vectors than it has dimensions."""
        few = min(count for count in counts if count)
        if few < dimensions:
            self.inputs.remarks.add(
                f"{name} comes from {few} images in {dimensions} dimensions: its covariance is singular and "
                "the value biased upwards; compare it only with values from as many images"
            )

    def teacher_distance(self) -> Values:
        """`fd_teacher`: Frechet distance in the features of the reference's own depth."""
        inputs, teacher = self.inputs, self.networks.get("reference")
        if teacher is None:
            return {}
        if feature_layer(teacher) is None:
            inputs.remarks.add("no fd_teacher: the reference has no middle block and no last one")
            return {}
        count, samples = inputs.settings.samples, self.store.images
        conditions = inputs.task.conditions(count)
        own = self.features(teacher, samples("model"), conditions)
        dense = self.features(teacher, samples("reference"), conditions)
        real = self.real_features(teacher) or dense
        self.warn_of_few("fd_teacher", len(own.mean), own.count, real.count)
        origin = {
            "ci95": None,
            "n": count,
            "against": "reference" if real is dense else "data",
            "n_real": real.count,
            "dimensions": len(own.mean),
            "timestep": feature_index(inputs.task.plain),
        }
        found = {"fd_teacher": {"value": frechet_distance(real, own)} | origin}
        if real is not dense:
            found["fd_teacher_reference"] = {"value": frechet_distance(real, dense)} | origin
        return found

    def real_features(self, teacher: nn.Module) -> Gaussian | None:
        """The Gaussian of real images, if there are any."""
        inputs, count = self.inputs, self.inputs.settings.samples
        if inputs.data is not None:
            return self.features(teacher, self.real_images(count), inputs.task.conditions(count))
        given = inputs.task.given
        if given is None or inputs.task.reconstructs or len(given.images) < 2:
            return None
        return self.features(
            teacher, iter(in_memory(given.images[:count]).split(FEATURE_BATCH)), given.conditions
        )

    def real_images(self, count: int) -> Iterator[torch.Tensor]:
        """At most `count` images of `--data` in the network's range, batch by batch."""
        inputs = self.inputs
        batches = image_batches(
            str(inputs.recipe.data),
            size=(inputs.task.shape[1], inputs.task.shape[2]),
            channels=inputs.task.shape[0],
            limit=count,
            batch=FEATURE_BATCH,
            seed=inputs.recipe.seed,
            progress=self.progress,
        )
        return (inputs.in_network_range(images) for images in batches)

    def features(self, teacher: nn.Module, images: Iterator[torch.Tensor], conditions: Condition) -> Gaussian:
        """The Gaussian of images in the teacher's features."""
        count = self.inputs.settings.samples
        return gaussian(
            teacher_features(
                teacher,
                self.inputs.task.plain,
                images,
                conditions=conditions,
                seed=self.inputs.recipe.seed,
                progress=self.progress,
                total=count,
            )
        )

    def loss(self) -> Values:
        """The denoising loss of both networks."""
        return self.losses.metrics()

    @cached_property
    def losses(self) -> Losses:
        """Denoising losses on real images, or else on images that the reference drew."""
        inputs, given = self.inputs, self.inputs.task.given
        if given is not None:
            images, conditions = in_memory(given.images[:LOSS_DRAWS]), given.conditions
        else:
            role = "reference" if "reference" in self.networks else "model"
            images = (
                first_images(self.store.images(role), LOSS_DRAWS)
                if inputs.data is None
                else inputs.in_network_range(inputs.data)
            )
            conditions = inputs.task.conditions(len(images))
        draws = Draws(
            images.to(self.device),
            inputs.task.plain.steps,
            inputs.recipe.seed,
            conditions,
        )
        return denoising_losses(
            self.networks["model"],
            self.networks.get("reference"),
            inputs.task.process,
            draws,
            precision=inputs.recipe.precision,
            progress=self.progress,
        )

    def grid(self) -> list[tuple[bytes, bytes]]:
        """Pairs of PNG files (reference, model), by image number; an empty file for no reference."""
        if not self.inputs.pictures:
            return []
        own = [png(image) for image in first_images(self.shown("model"), GRID)]
        if "reference" not in self.networks:
            return [(b"", image) for image in own]
        other = [png(image) for image in first_images(self.shown("reference"), GRID)]
        return list(zip(other, own, strict=True))


def first_images(chunks: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    """The first images of a stream of chunks, at most `count`."""
    found: list[torch.Tensor] = []
    while sum(map(len, found)) < count and (chunk := next(chunks, None)) is not None:
        found.append(chunk)
    return torch.cat(found)[:count]


def png(image: torch.Tensor) -> bytes:
    """An image [C, H, W] in [0, 1] as a PNG file; two or more than four channels show the first one."""
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(stream, "PNG")
    return stream.getvalue()
