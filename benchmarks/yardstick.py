"""How far a pruned network is from its dense original: the numbers that the benchmark compares."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.checkpoint.reader import inspect, load_scheduler
from gfprune_cli.checkpoint.source import DEMO, resolve
from gfprune_cli.data.conditions import call
from gfprune_cli.data.diffusion import NoisingProcess, noising_process
from gfprune_cli.data.draws import Draws, generator
from gfprune_cli.data.images import to_model_range
from gfprune_cli.evaluation.consistency import ssim, unit_range
from gfprune_cli.evaluation.statistics import frechet_distance, gaussian
from gfprune_cli.evaluation.teacher import teacher_features
from gfprune_cli.progress import silent

LOSS_DRAWS = 2048
BINS = 5
CHUNK = 32
SEED = 1  # of what is measured with; runs use others


@dataclass(frozen=True)
class Subject:
    """A dense checkpoint, the images it was trained on, and images that nothing has seen."""

    name: str
    model: str
    data: Path
    held_out: torch.Tensor
    process: NoisingProcess
    dense: nn.Module


def subject(name: str, model: str, data: Path) -> Subject:
    """A subject whose .npz holds `x` and `held_out`, uint8 [N, H, W, 3]."""
    with np.load(data) as arrays:
        held_out = pictures(arrays["held_out"])
    scheduler = load_scheduler(inspect(resolve(model)))
    return Subject(name, model, data, held_out, noising_process(scheduler), gfprune.load(model))


def demo() -> Subject:
    return subject("demo", "demo", DEMO / "images.npz")


def pictures(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return to_model_range(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def pictures_of(subject: Subject) -> torch.Tensor:
    """The images that a subject was trained on."""
    with np.load(subject.data) as arrays:
        return pictures(arrays["x"])


@torch.no_grad()
def losses(subject: Subject, model: nn.Module, draws: int = LOSS_DRAWS) -> tuple[float, list[float]]:
    """Denoising loss on the held-out images, and that of equal ranges of the schedule, least noise first."""
    source = Draws(subject.held_out, subject.process.steps, SEED)
    found = []
    for first in range(0, draws, CHUNK):
        batch = source.batch("held-out", 0, min(CHUNK, draws - first), first=first, of=draws)
        noisy = subject.process.add_noise(batch.images, batch.noise, batch.index)
        output = call(model, noisy, subject.process.timesteps(batch.index), None)
        found.append(subject.process.losses(output, batch.images, batch.noise, batch.index).double())
    values = torch.cat(found)
    return float(values.mean()), [float(part.mean()) for part in values.chunk(BINS)]


@torch.no_grad()
def samples(subject: Subject, model: nn.Module, count: int, steps: int) -> torch.Tensor:
    """[count, C, H, W] DDIM samples; image i always comes from the same noise."""
    drawn = []
    shape = subject.held_out.shape[1:]
    for first in range(0, count, CHUNK):
        noise = [
            torch.randn(shape, generator=generator(SEED, "sample", index))
            for index in range(first, min(count, first + CHUNK))
        ]
        drawn.append(subject.process.sample(lambda x, t: call(model, x, t, None), torch.stack(noise), steps))
    return torch.cat(drawn)


class Yardstick:
    """Measures networks against one dense model, whose own numbers are taken once.

    Args:
        count, steps: samples drawn from each network, and sampling steps of each.
    """

    def __init__(self, subject: Subject, count: int, steps: int, draws: int = LOSS_DRAWS) -> None:
        self.subject, self.count, self.steps, self.draws = subject, count, steps, draws
        self.loss, self.bins = losses(subject, subject.dense, draws)
        self.images = samples(subject, subject.dense, count, steps)
        self.features = gaussian(self.seen(self.images))

    def seen(self, images: torch.Tensor) -> np.ndarray:
        """[N, D] features of the dense model's middle block."""
        process = self.subject.process
        return teacher_features(
            self.subject.dense,
            process,
            images.split(CHUNK),
            conditions=None,
            seed=SEED,
            report=silent,
            total=len(images),
        )

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """`loss`, `bins`, `ssim`, `fd_teacher` and `params` of a network."""
        loss, bins = losses(self.subject, model, self.draws)
        images = samples(self.subject, model, self.count, self.steps)
        shown = partial(
            unit_range, low=self.subject.process.value_range[0], high=self.subject.process.value_range[1]
        )
        return {
            "loss": loss,
            "bins": bins,
            "ssim": float(ssim(shown(self.images), shown(images)).mean()),
            "fd_teacher": frechet_distance(self.features, gaussian(self.seen(images))),
            "params": sum(parameter.numel() for parameter in model.parameters()),
        }
