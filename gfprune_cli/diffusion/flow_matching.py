"""Rectified flow: straight lines from images to noise."""

from dataclasses import dataclass

import torch

from gfprune_cli.diffusion.process import Denoiser, NoisingProcess, mean_part, mean_square, per_sample


@dataclass(frozen=True)
class FlowMatching(NoisingProcess):
    """x_s = (1 - s) x_0 + s noise, the network outputs noise - x_0 (arXiv 2209.03003, 2210.02747).

    Args:
        sigmas: [T] noise levels s, ascending, the last one 1.
        scale: the network is told scale * s.
        inverted: the network is told scale * (1 - s), and outputs x_0 - noise.
    """

    sigmas: torch.Tensor
    scale: float
    inverted: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        sigma = self.sigmas.to(index.device)[index]
        return (1 - sigma if self.inverted else sigma) * self.scale

    @property
    def sign(self) -> int:
        return -1 if self.inverted else 1

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        sigma = per_sample(self.sigmas, index, images)
        return (1 - sigma) * images + sigma * noise

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        return mean_square(mean_part(output, images) - self.sign * (noise - images))

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(snr, gamma) s^2: the error of the predicted image is s times that of the output."""
        sigma = self.sigmas.to(index.device)[index]
        ratio = ((1 - sigma) / sigma.clamp_min(1e-12)).square()
        return ratio.clamp_max(gamma) * sigma.square()

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Euler steps along the flow, from pure noise to s = 0."""
        grid = torch.linspace(self.steps - 1, 0, steps + 1).round().long()[:-1].tolist()
        x = noise
        for position, now in enumerate(grid):
            index = torch.full((len(x),), now, device=x.device)
            following = float(self.sigmas[grid[position + 1]]) if position + 1 < len(grid) else 0.0
            step = following - float(self.sigmas[now])
            x = x + self.sign * step * mean_part(denoise(x, self.timesteps(index)), x)
        return x


def shifted(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """More of the schedule at high noise, for larger images (arXiv 2403.03206, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)
