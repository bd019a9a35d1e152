"""Autoencoders as denoisers without noise: one step, and the error is that of the reconstruction."""

from dataclasses import dataclass

import torch

from gfprune_cli.diffusion.process import Denoiser, NoisingProcess, mean_square


@dataclass(frozen=True)
class Reconstruction(NoisingProcess):
    """The network gives its input back; nothing is added to it."""

    @property
    def steps(self) -> int:
        return 1

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        return index

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return images

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        return mean_square(output - images)

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        return torch.ones(len(index), device=index.device)

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """What the network makes of its input, in one pass."""
        return denoise(noise, torch.zeros(len(noise), dtype=torch.long, device=noise.device))
