"""Classifier-free guidance as part of the loss (arXiv 2207.12598)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gfprune_cli.diffusion.conditions import Condition, Conditions
from gfprune_cli.diffusion.schedulers import Denoiser, NoisingProcess


@dataclass(frozen=True)
class GuidedProcess(NoisingProcess):
    """A noising process whose networks output two branches [N, 2, ...], unconditional first.

    Args:
        process: of each branch.
        guidance: scale s of the guided output u + s (c - u).
    """

    process: NoisingProcess
    guidance: float

    @property
    def steps(self) -> int:
        return self.process.steps

    @property
    def value_range(self) -> tuple[float, float]:
        return self.process.value_range

    def timesteps(self, index: torch.Tensor) -> torch.Tensor:
        return self.process.timesteps(index)

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.process.add_noise(images, noise, index)

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """[N, ...] what the sampler follows."""
        without, given = output.unbind(1)
        return without + self.guidance * (given - without)

    def losses(
        self, output: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the branches: a network trained for guidance has learned to denoise in both."""
        return branch_mean(lambda one: self.process.losses(one, images, noise, index), output)

    def distance(self, output: torch.Tensor, reference: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Half the mean distance of the branches, half that of the guided outputs.

        Independent errors of the branches grow by s^2 + (s - 1)^2 in the guided output; divided by that,
        the two halves weigh the same.
        """
        branches = branch_mean(lambda one, other: self.process.distance(one, other, index), output, reference)
        guided = self.process.distance(self.guided(output), self.guided(reference), index)
        return 0.5 * branches + 0.5 * guided / (self.guidance**2 + (self.guidance - 1) ** 2)

    def min_snr(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        return self.process.min_snr(index, gamma)

    def image_weight(self, index: torch.Tensor, cap: float) -> torch.Tensor:
        return self.process.image_weight(index, cap)

    def sample(self, denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """As without guidance, along the guided output; `denoise` returns both branches."""
        return self.process.sample(lambda x, timesteps: self.guided(denoise(x, timesteps)), noise, steps)


def branch_mean(function: Callable[..., torch.Tensor], *outputs: Any) -> torch.Tensor:
    """[N] mean of what a function says of each branch."""
    pairs = zip(*(output.unbind(1) for output in outputs), strict=True)
    return torch.stack([function(*branch) for branch in pairs]).mean(0)


def with_guidance(process: NoisingProcess, condition: Condition) -> NoisingProcess:
    """The process for networks that are called under this condition."""
    if isinstance(condition, Conditions) and condition.branches == 2:
        return GuidedProcess(process, condition.guidance)
    return process
