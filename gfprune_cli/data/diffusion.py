"""The noising process of a checkpoint: noisy inputs, the denoising loss, few-step sampling.

    process = noising_process(scheduler)
    noisy = process.add_noise(images, noise, index)
    loss = process.loss(model(noisy, process.timesteps(index)).sample, images, noise, index)

`index` is the position in the training schedule, 0 (least noise) to `steps - 1`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gfprune_cli.errors import GfpruneError

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NoisingProcess(Protocol):
    """What training and sampling need to know about a scheduler."""

    @property
    def steps(self) -> int:
        """Length of the training schedule."""

    @property
    def value_range(self) -> tuple[float, float]:
        """What the darkest and the brightest pixel are to the network."""

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        """[N] what the network is told about the noise level."""

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] noisy inputs."""

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """[N] denoising loss of each sample, for the network output at these noise levels."""

    def distance(self, output: torch.Tensor, reference: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[N] squared distance of two network outputs, in the units of the denoising loss."""

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """[N] min-SNR weight of each sample's denoising loss (arXiv 2303.09556)."""

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """[N, C, H, W] images from standard normal noise in a few deterministic steps."""


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    """[N] mean over all but the first dimension; written out, as `F.mse_loss` breaks forward-mode AD."""
    return difference.float().square().flatten(1).mean(1)


def per_sample(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, 1, 1, 1] entries of a schedule, on the device and in the dtype of `like`."""
    return values.to(like.device)[index].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM and its relatives: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (arXiv 2006.11239).

    Args:
        signal: [T] cumulative products a_t.
        prediction: "epsilon", "v_prediction" (arXiv 2202.00512) or "sample".
        clip: whether predicted images are clipped to [-1, 1] while sampling.
    """

    signal: torch.Tensor
    prediction: str
    clip: bool

    @property
    def value_range(self) -> tuple[float, float]:
        return -1.0, 1.0

    @property
    def steps(self) -> int:
        return len(self.signal)

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        return index

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        signal = per_sample(self.signal, index, images)
        return signal.sqrt() * images + (1 - signal).sqrt() * noise

    def target(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return images
        signal = per_sample(self.signal, index, images)
        return signal.sqrt() * noise - (1 - signal).sqrt() * images

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        return mean_square(output - self.target(images, noise, index))

    def distance(self, output: torch.Tensor, reference: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return mean_square(output - reference)

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(snr, gamma) over what the loss on this prediction already weighs: snr, snr + 1, or 1."""
        signal = self.signal.to(index.device)[index]
        ratio = signal / (1 - signal).clamp_min(1e-12)
        capped = ratio.clamp_max(gamma)
        if self.prediction == "sample":
            return capped
        if self.prediction == "v_prediction":
            return capped / (ratio + 1)
        return torch.where(ratio > 0, capped / ratio.clamp_min(1e-12), 1.0)  # at snr 0 the limit is 1

    def split(
        self, output: torch.Tensor, x: torch.Tensor, signal: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(predicted image, predicted noise) from a network output."""
        a, b = signal.sqrt(), (1 - signal).sqrt()
        if self.prediction == "epsilon":
            image = (x - b * output) / a
        elif self.prediction == "sample":
            image = output
        else:
            image = a * x - b * output
        image = image.clamp(-1, 1) if self.clip else image
        return image, (x - a * image) / b

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """DDIM with eta 0 and trailing timesteps (arXiv 2010.02502)."""
        grid = torch.linspace(self.steps - 1, 0, steps + 1).round().long()[:-1].tolist()
        x, image = noise, noise
        for position, now in enumerate(grid):
            index = torch.full((len(x),), now, device=x.device)
            signal = per_sample(self.signal, index, x)
            image, predicted = self.split(denoise(x, self.timesteps(index)), x, signal)
            if position + 1 < len(grid):
                following = per_sample(self.signal, torch.full_like(index, grid[position + 1]), x)
                x = following.sqrt() * image + (1 - following).sqrt() * predicted
        return image


@dataclass(frozen=True)
class VarianceExploding:
    """Score-SDE: x = x_0 + sigma noise, the network outputs the score -noise / sigma (arXiv 2011.13456).

    Args:
        sigmas: [T] noise levels, ascending.
    """

    sigmas: torch.Tensor

    @property
    def value_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        return self.sigmas.to(index.device)[index]

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return images + per_sample(self.sigmas, index, images) * noise

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        return mean_square(per_sample(self.sigmas, index, output) * output + noise)

    def distance(self, output: torch.Tensor, reference: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return mean_square(per_sample(self.sigmas, index, output) * (output - reference))

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """As for epsilon prediction, with snr = 1 / sigma^2."""
        ratio = self.sigmas.to(index.device)[index] ** -2
        return ratio.clamp_max(gamma) / ratio

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Euler steps along the probability-flow ODE, equally spaced in log sigma (arXiv 2206.00364)."""
        grid = torch.linspace(self.steps - 1, 0, steps).round().long().tolist()
        x = noise * self.sigmas[-1].to(noise.device)
        for position, now in enumerate(grid):
            index = torch.full((len(x),), now, device=x.device)
            score = denoise(x, self.timesteps(index))
            sigma = float(self.sigmas[now])
            following = float(self.sigmas[grid[position + 1]]) if position + 1 < len(grid) else 0.0
            x = x + sigma * (sigma - following) * score
        return x.clamp(*self.value_range)


def noising_process(scheduler: Any) -> NoisingProcess:
    """The training process behind a diffusers scheduler.

    Raises:
        GfpruneError: the scheduler's noise cannot be derived from its configuration.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if name == "ScoreSdeVeScheduler":
        levels = torch.linspace(0, 1, config.num_train_timesteps)
        ratio = config.sigma_max / config.sigma_min
        return VarianceExploding(config.sigma_min * ratio**levels)
    signal = getattr(scheduler, "alphas_cumprod", None)
    prediction = config.get("prediction_type", "epsilon")
    if signal is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise GfpruneError(
            f"scheduler {name} (prediction_type {prediction!r}) is not supported: use one with a DDPM, "
            "DDIM, PNDM, DPM-Solver, Euler or ScoreSdeVe scheduler"
        )
    clip = bool(config.get("clip_sample", False))
    return VariancePreserving(torch.as_tensor(signal).float().cpu(), prediction, clip)
