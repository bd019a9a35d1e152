"""How far a pruned network is from its dense original: the numbers that the benchmark compares."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import DEMO, resolve
from gfprune_cli.data.images import to_model_range
from gfprune_cli.diffusion.conditions import call
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.schedulers import NoisingProcess, noising_process
from gfprune_cli.errors import UsageError
from gfprune_cli.evaluation.consistency import ssim, unit_range
from gfprune_cli.evaluation.statistics import frechet_distance, gaussian
from gfprune_cli.evaluation.teacher import teacher_features
from gfprune_cli.outputs.durable import write_tensors
from gfprune_cli.progress import silent

LOSS_DRAWS = 1024
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

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights, noise schedule and images."""
        digest = hashlib.sha256(self.data.read_bytes())
        digest.update(repr(self.process).encode())
        for name, tensor in sorted(self.dense.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def on(self, device: torch.device) -> "Subject":
        """The same, its network and images on a device."""
        return replace(self, held_out=self.held_out.to(device), dense=nn.Module.to(self.dense, device))


def subject(name: str, model: str, data: Path) -> Subject:
    """A subject whose .npz holds `x` and `held_out`, uint8 [N, H, W, C] as the network takes them.

    Raises:
        UsageError: images that do not fit the network, or a network that the peers cannot prune.
    """
    dense = gfprune.load(model)
    config: Any = dense.config
    if type(dense).__name__ != "UNet2DModel" or config.num_class_embeds or config.class_embed_type:
        raise UsageError(f"{model}: only dense, unconditional UNet2DModel checkpoints can be compared")
    size = config.sample_size
    wanted = (*((size, size) if isinstance(size, int) else size), config.in_channels)
    process = noising_process(load_scheduler(inspect(resolve(model))))
    held_out = read_images(data, wanted)["held_out"]
    return Subject(name, model, data, pictures(held_out, process), process, dense)


def read_images(data: Path, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """`x` and `held_out` of an .npz file, whose images have this shape."""
    if not data.is_file():
        raise UsageError(f"{data}: no such file; it has to hold `x` and `held_out`")
    with np.load(data) as arrays:
        found = {key: arrays[key] for key in ("x", "held_out") if key in arrays}
    for key in ("x", "held_out"):
        images = found.get(key, np.zeros(0))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or len(images) < 2:
            wanted = ", ".join(map(str, shape))
            raise UsageError(f"{data}: needs an array {key!r} of the network's images, uint8 [N, {wanted}]")
    return found


def demo() -> Subject:
    return subject("demo", "demo", DEMO / "images.npz")


def pictures(images: np.ndarray, process: NoisingProcess) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float [N, C, H, W] in the range that the process works in."""
    low, high = process.value_range
    scaled = to_model_range(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    return (scaled + 1) * ((high - low) / 2) + low


def pictures_of(subject: Subject) -> torch.Tensor:
    """The images that a subject was trained on."""
    with np.load(subject.data) as arrays:
        return pictures(arrays["x"], subject.process).to(subject.held_out.device)


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
        start = torch.stack(noise).to(subject.held_out)
        drawn.append(subject.process.sample(lambda x, t: call(model, x, t, None), start, steps))
    return torch.cat(drawn)


class Yardstick:
    """Measures networks against one dense model, whose own numbers are taken once.

    Args:
        count, steps: samples drawn from each network, and sampling steps of each.
        cache: a safetensors file that keeps the dense model's numbers from one process to the next.
    """

    def __init__(
        self, subject: Subject, count: int, steps: int, draws: int = LOSS_DRAWS, cache: Path | None = None
    ) -> None:
        self.subject, self.count, self.steps, self.draws = subject, count, steps, draws
        dense = load_file(cache) if cache and cache.exists() else self.of_dense()
        if cache and not cache.exists():
            write_tensors(cache, dense)
        self.losses, self.images = dense["losses"], dense["images"].to(subject.held_out.device)
        self.features = gaussian(dense["features"].numpy())

    def of_dense(self) -> dict[str, torch.Tensor]:
        """`losses` [1 + bins], `images` and their `features` of the dense model."""
        loss, bins = losses(self.subject, self.subject.dense, self.draws)
        images = samples(self.subject, self.subject.dense, self.count, self.steps)
        return {
            "losses": torch.tensor([loss, *bins], dtype=torch.float64),
            "images": images,
            "features": torch.from_numpy(self.seen(images)),
        }

    def seen(self, images: torch.Tensor) -> np.ndarray:
        """[N, D] features of the dense model's middle block."""
        process = self.subject.process
        return teacher_features(
            self.subject.dense,
            process,
            images.split(CHUNK),
            conditions=None,
            seed=SEED,
            progress=silent,
            total=len(images),
        )

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """`loss`, `bins`, `ssim`, `fd_teacher` and `params` of a network."""
        loss, bins = losses(self.subject, model, self.draws)
        images = samples(self.subject, model, self.count, self.steps)
        low, high = self.subject.process.value_range
        shown = partial(unit_range, low=low, high=high)
        return {
            "loss": loss,
            "bins": bins,
            "ssim": float(ssim(shown(self.images), shown(images)).mean()),
            "fd_teacher": frechet_distance(self.features, gaussian(self.seen(images))),
            "params": sum(parameter.numel() for parameter in model.parameters()),
        }
