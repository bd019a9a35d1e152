"""Noise of the DDPM family: variance preserving and variance exploding."""

import math
from dataclasses import dataclass

import torch

from gfprune_cli.diffusion.process import Denoiser, NoisingProcess, mean_part, mean_square, per_sample


@dataclass(frozen=True)
class Limits:
    """What a scheduler does to predicted images while it samples.

    Args:
        bound: they are clipped to [-bound, bound]; infinite for no clipping.
        quantile: of the absolute values of an image: what exceeds it is clipped, and the image divided by it
            (dynamic thresholding, arXiv 2205.11487), in place of clipping; 0 for none.
        most: the largest such divisor; the smallest is 1.
    """

    bound: float = math.inf
    quantile: float = 0.0
    most: float = 1.0

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """[N, ...] images within the limits."""
        if self.quantile:
            flat = images.flatten(1).float()
            divisor = flat.abs().quantile(self.quantile, dim=1).clamp(1, max(1.0, self.most))
            view = divisor.view(-1, *[1] * (images.ndim - 1)).to(images.dtype)
            return torch.minimum(torch.maximum(images, -view), view) / view
        return images if math.isinf(self.bound) else images.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class VariancePreserving(NoisingProcess):
    """DDPM and its relatives: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (arXiv 2006.11239).

    Args:
        signal: [T] cumulative products a_t.
        prediction: "epsilon", "v_prediction" (arXiv 2202.00512), "sample", or "negative_v", as the
            preconditioning of EDM calls for (arXiv 2206.00364, table 1).
        limits: of predicted images while sampling.
        times: [T] what the network is told; None: the index.
        white: what the brightest pixel is to the network, and minus the darkest.
    """

    signal: torch.Tensor
    prediction: str
    limits: Limits = Limits()
    times: torch.Tensor | None = None
    white: float = 1.0

    @property
    def value_range(self) -> tuple[float, float]:
        return -self.white, self.white

    @property
    def steps(self) -> int:
        return len(self.signal)

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        return index if self.times is None else self.times.to(index.device)[index]

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        signal = per_sample(self.signal, index, images)
        return signal.sqrt() * images + (1 - signal).sqrt() * noise

    def target(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return images
        signal = per_sample(self.signal, index, images)
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * images
        return -velocity if self.prediction == "negative_v" else velocity

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        return mean_square(mean_part(output, images) - self.target(images, noise, index))

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(snr, gamma) over what the loss on this prediction already weighs: snr, snr + 1, or 1."""
        signal = self.signal.to(index.device)[index]
        ratio = signal / (1 - signal).clamp_min(1e-12)
        capped = ratio.clamp_max(gamma)
        if self.prediction == "sample":
            return capped
        if self.prediction in ("v_prediction", "negative_v"):
            return capped / (ratio + 1)
        return torch.where(ratio > 0, capped / ratio.clamp_min(1e-12), 1.0)  # at snr 0 the limit is 1

    def image_weight(self, index: torch.Tensor, cap: float) -> torch.Tensor:
        signal = self.signal.to(index.device)[index]
        ratio = signal / (1 - signal).clamp_min(1e-12)
        if self.prediction == "sample":
            return 1 + ratio.clamp_max(cap)
        if self.prediction in ("v_prediction", "negative_v"):
            return torch.ones_like(ratio)
        return 1 + (1 / ratio.clamp_min(1e-12)).clamp_max(cap)

    def split(
        self, output: torch.Tensor, x: torch.Tensor, signal: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(predicted image, predicted noise) from a network output."""
        a, b = signal.sqrt(), (1 - signal).sqrt()
        output = mean_part(output, x)
        if self.prediction == "epsilon":
            image = (x - b * output) / a
        elif self.prediction == "sample":
            image = output
        else:
            image = a * x - b * (-output if self.prediction == "negative_v" else output)
        image = self.limits.apply(image)
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
class VarianceExploding(NoisingProcess):
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

    def image_weight(self, index: torch.Tensor, cap: float) -> torch.Tensor:
        return 1 + self.sigmas.to(index.device)[index].square().clamp_max(cap)

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
