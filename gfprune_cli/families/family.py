"""What gfprune knows of one architecture: a row of the table in `families.table`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
APART = "apart"  # a module that neither reads nor writes the stream


@dataclass(frozen=True)
class Sizes:
    """Sizes that replace the family's own: latent frames, latent height and width, and text tokens."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    text: int | None = None


@dataclass(frozen=True)
class Request:
    """A model whose inputs are wanted, and the tensors to make them of."""

    model: Any
    sizes: Sizes

    @property
    def config(self) -> Any:
        return self.model.config

    def zeros(self, *shape: int) -> torch.Tensor:
        parameter = next(self.model.parameters())
        return torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)

    def time(self) -> torch.Tensor:
        return self.zeros(1) + 1

    def index(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=next(self.model.parameters()).device, dtype=torch.long)

    def text(self, tokens: int, width: int) -> torch.Tensor:
        return self.zeros(1, self.sizes.text or tokens, width)

    def area(self, height: int, width: int | None = None) -> tuple[int, int]:
        return self.sizes.height or height, self.sizes.width or width or height


@dataclass(frozen=True)
class Ends:
    """What one class does before and after its blocks.

    Args:
        roles: module -> "out" where it writes the stream, "in" where it reads it, "both", or APART.
        text: the text states live in the same channels: "joined" where they run through the blocks beside
            the image, "read" where cross-attention reads them, "" where they have channels of their own.
    """

    roles: Mapping[str, str]
    text: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture, or several classes of it.

    Args:
        classes: names in diffusers; what inherits from them belongs to the family, too.
        inputs: keyword arguments of `forward` for one sample of zeros; None where the configuration does not
            tell them, and they are recorded from the pipeline.
        ends: how the residual stream begins and ends; None where it may not narrow.
        blocks: classes of residual blocks that carry one stream, its first argument.
        pairs: likewise of two streams -> the arguments that are the streams, in the order in which the block
            returns them.
        masked: whether the text comes with a mask of attention when the network is exported.
        time_factor: what timesteps of the scheduler are multiplied by.
        adds: of networks that predict nothing themselves: the arguments of the denoiser that take what they
            return, in turn.
    """

    classes: tuple[str, ...]
    inputs: Callable[[Request], Inputs] | None
    ends: Ends | None = None
    blocks: tuple[str, ...] = ()
    pairs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    masked: bool = False
    time_factor: float = 1.0
    adds: tuple[str, ...] = ()


def picture(request: Request) -> torch.Tensor:
    """Latents of one picture, [1, C, H, W]."""
    height, width = request.area(request.config.sample_size)
    return request.zeros(1, request.config.in_channels, height, width)
