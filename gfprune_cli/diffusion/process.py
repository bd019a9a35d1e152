"""What every noising process answers, and the arithmetic that they share.

`index` is the position in the training schedule, 0 (least noise) to `steps - 1`.
"""

from collections.abc import Callable
from typing import Protocol

import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NoisingProcess(Protocol):
    """What training and sampling need to know about a scheduler; what has a body here is what most answer."""

    @property
    def steps(self) -> int:
        """Length of the training schedule."""

    @property
    def value_range(self) -> tuple[float, float]:
        """What the darkest and the brightest pixel are to the network."""
        return -1.0, 1.0

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        """[N] what the network is told about the noise level."""

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[N, ...] noisy inputs."""

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """[N] denoising loss of each sample, for the network output at these noise levels."""

    def distance(self, output: torch.Tensor, reference: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[N] squared distance of two network outputs, in the units of the denoising loss."""
        return mean_square(output - reference)

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """[N] min-SNR weight of each sample's denoising loss (arXiv 2303.09556)."""

    def image_weight(self, index: torch.Tensor, cap: float) -> torch.Tensor:
        """[N] factor of each sample's loss that adds the error of the image it predicts to that of the noise.

        Errors e of the noise and e / snr of the image are two sides of one error. Where 1 / snr exceeds `cap`
        it counts as `cap`. Losses on a velocity hold both as they are.
        """
        return torch.ones(len(index), device=index.device)

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """[N, ...] images from standard normal noise in a few deterministic steps."""


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    """[N] mean over all but the first dimension; written out, as `F.mse_loss` breaks forward-mode AD."""
    return difference.float().square().flatten(1).mean(1)


def per_sample(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, 1, ...] entries of a schedule, on the device and in the dtype of `like`."""
    return values.to(like.device, non_blocking=True)[index].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def mean_part(output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first channels, of images or tokens, of networks that also learn a variance (arXiv 2102.09672), one
    for each channel or one for all; else all."""
    if output.ndim == like.ndim:
        for axis in range(1, like.ndim):
            if output.shape[axis] > like.shape[axis]:
                return output.narrow(axis, 0, like.shape[axis])
    return output
