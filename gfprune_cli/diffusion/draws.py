"""Every random number of a run, derived from (seed, purpose, step, index) and never from history.

That is what makes a run resumable in the middle, and independent of how batches are split.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, Protocol, overload

import torch

from gfprune_cli.diffusion.conditions import Condition, some_of
from gfprune_cli.diffusion.levels import LevelDensity

Levels = Literal["adaptive", "stratified", "antithetic", "uniform"]


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one purpose: the same on every device and in every process."""
    text = "/".join(str(part) for part in (seed, *path))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class ImageStack(Protocol):
    """Images [N, ...]: a tensor, or what is read when a batch is asked for."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, chosen: slice, /) -> "ImageStack": ...
    @overload
    def __getitem__(self, chosen: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Samples to denoise: `images`, `noise` [N, ...], `index` [N] into the schedule, their `condition`.

    `weight` [N] is what their losses are multiplied by where levels were not drawn evenly.
    """

    images: torch.Tensor
    noise: torch.Tensor
    index: torch.Tensor
    condition: Condition = None
    weight: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Draws:
    """Batches from a fixed set of images.

    Args:
        images: [N, ...] in the range and layout the network works in.
        steps: length of the noise schedule.
        seed: of the run.
        conditions: of the images.
        device: where batches go; None: where the images are.
    """

    images: ImageStack
    steps: int
    seed: int
    conditions: Condition = None
    device: torch.device | None = None

    def batch(
        self,
        purpose: str,
        step: int,
        size: int,
        *,
        first: int = 0,
        of: int | None = None,
        levels: Levels = "stratified",
        density: LevelDensity | None = None,
    ) -> Batch:
        """`size` draws of one step: images and noise at random, noise levels as `levels` says.

        Args:
            first, of: these are draws `first ... first + size - 1` of `of` that share one step.
            levels: "stratified" puts one draw in each of `of` equal parts of the schedule; "antithetic"
                draws pairs t, T - 1 - t, stratified over the pairs (arXiv 2107.00630, appendix I.1);
                "uniform" draws independently; "adaptive" is "stratified" with parts of unequal width:
            density: that each of them has the same share of.
        """
        of = of or size
        chosen, noise, index = [], [], []
        for draw in range(first, first + size):
            source = generator(self.seed, purpose, step, draw)
            chosen.append(int(torch.randint(len(self.images), (), generator=source)))
            offset = float(torch.rand((), generator=source))
            index.append(self.level(purpose, step, draw, of, levels, offset, density))
            noise.append(torch.randn(self.images.shape[1:], generator=source))
        # none of these copies waits for the device: it is still busy with the batch before
        device = self.device or self.images.device
        images = self.images[torch.tensor(chosen).to(self.images.device, non_blocking=True)]
        weight = None if density is None else density.weights(index).to(device, non_blocking=True)
        return Batch(
            images.to(device, non_blocking=True),
            torch.stack(noise).to(device, self.images.dtype, non_blocking=True),
            torch.tensor(index).to(device, non_blocking=True),
            None if self.conditions is None else self.conditions[chosen].to(device),
            weight,
        )

    def level(
        self,
        purpose: str,
        step: int,
        draw: int,
        of: int,
        levels: Levels,
        offset: float,
        density: LevelDensity | None,
    ) -> int:
        """Position in the schedule of one draw; `offset` in [0, 1) is its own random number."""
        share = offset if levels == "uniform" else (draw + offset) / of
        if density is not None:
            share = density.place(share)
        if levels == "antithetic":
            pair = draw // 2
            source = generator(self.seed, purpose, step, "pair", pair)
            share = (pair + float(torch.rand((), generator=source))) / ((of + 1) // 2)
        index = min(self.steps - 1, int(share * self.steps))
        return self.steps - 1 - index if levels == "antithetic" and draw % 2 else index

    def split(self, first: int) -> tuple["Draws", "Draws"]:
        """Draws from so many images, the first, and from the others."""
        one, other = (
            replace(self, images=self.images[part], conditions=some_of(self.conditions, part))
            for part in (slice(first), slice(first, None))
        )
        return one, other

    def directions(self, purpose: str, step: int, size: int, *, first: int = 0) -> torch.Tensor:
        """[size, ...] standard normal, for draws `first ...` of one step."""
        drawn = [
            torch.randn(self.images.shape[1:], generator=generator(self.seed, purpose, step, draw))
            for draw in range(first, first + size)
        ]
        return torch.stack(drawn).to(self.device or self.images.device, self.images.dtype)
