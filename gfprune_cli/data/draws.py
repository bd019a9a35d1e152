"""Every random number of a run, derived from (seed, purpose, step, index) and never from history.

That is what makes a run resumable in the middle, and independent of how batches are split.
"""

import hashlib
from dataclasses import dataclass

import torch


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one purpose: the same on every device and in every process."""
    text = "/".join(str(part) for part in (seed, *path))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Batch:
    """Samples to denoise: `images`, `noise` [N, C, H, W], `index` [N] into the schedule, `labels` [N]."""

    images: torch.Tensor
    noise: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Draws:
    """Batches from a fixed set of images.

    Args:
        images: [N, C, H, W] in the range the network works in.
        steps: length of the noise schedule.
        seed: of the run.
        labels: [N] class labels, for class-conditional networks.
    """

    images: torch.Tensor
    steps: int
    seed: int
    labels: torch.Tensor | None = None

    def batch(self, purpose: str, step: int, size: int, *, first: int = 0, of: int | None = None) -> Batch:
        """`size` draws of one step: images at random, noise levels stratified over the whole schedule.

        Args:
            first, of: these are draws `first ... first + size - 1` of `of` that share one stratification.
        """
        of = of or size
        chosen, noise, index = [], [], []
        for draw in range(first, first + size):
            source = generator(self.seed, purpose, step, draw)
            chosen.append(int(torch.randint(len(self.images), (), generator=source)))
            share = (draw + float(torch.rand((), generator=source))) / of
            index.append(min(self.steps - 1, int(share * self.steps)))
            noise.append(torch.randn(self.images.shape[1:], generator=source))
        device = self.images.device
        return Batch(
            self.images[chosen],
            torch.stack(noise).to(device, self.images.dtype),
            torch.tensor(index, device=device),
            None if self.labels is None else self.labels[chosen],
        )
