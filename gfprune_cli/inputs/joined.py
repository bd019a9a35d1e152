"""What a pipeline joins to noisy samples before its network sees them: masks, images, references."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from gfprune_cli.diffusion.conditions import AFTER, BEFORE

GIVEN = 0.5  # share of the frames that must be noisy
ALIKE = 0.999  # cosine of a noisy sample and its place in the network's input


@dataclass(frozen=True)
class Joined:
    """Where the noisy sample lies in the network's input.

    Args:
        axis: along which other things are joined to it.
        first, length: its place on that axis.
        shape: of one noisy sample, without the batch.
    """

    axis: int
    first: int
    length: int
    shape: tuple[int, ...]

    def own(self, given: torch.Tensor) -> torch.Tensor:
        """The noisy sample in an input [N, ...]."""
        return given.narrow(self.axis, self.first, self.length)

    def output(self, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The outputs for the noisy sample: all of them where others were never made."""
        same = output.ndim == given.ndim and output.shape[self.axis] == given.shape[self.axis]
        return self.own(output) if same else output

    def parts(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is joined to it, as conditions."""
        end = self.first + self.length
        found = {
            BEFORE: given.narrow(self.axis, 0, self.first),
            AFTER: given.narrow(self.axis, end, given.shape[self.axis] - end),
        }
        return {name: part for name, part in found.items() if part.shape[self.axis]}


def as_batch(samples: Any) -> torch.Tensor:
    """[N, ...] of a tensor or of a list of N."""
    return samples if isinstance(samples, torch.Tensor) else torch.stack(tuple(samples))


def whole_sample(given: torch.Tensor) -> Joined:
    """Nothing is joined to the noisy sample."""
    return Joined(1, 0, given.shape[1], tuple(given.shape[1:]))


def find_joined(given: torch.Tensor, stepped: torch.Tensor, branches: int) -> Joined | None:
    """Where the sample that the scheduler steps lies in the network's input; None if it is not there.

    Args:
        given: [N, ...] the network's input.
        stepped: the scheduler's sample, of one or of all branches.
        branches: of guidance, in all calls.
    """
    one = given[:1]
    if stepped.numel() in (one.numel(), one.numel() * branches):
        return whole_sample(given)
    for sample in layouts(stepped[:1], one.ndim):
        found = place_of(one, sample)
        if found is not None:
            return found
    return None


def place_of(one: torch.Tensor, sample: torch.Tensor) -> Joined | None:
    """Where a noisy sample lies in a network's input, both [1, ...]; None if it is not there.

    Along a second axis more than half must be there: the frames of a video but the first, which are given.
    """
    differs = [axis for axis in range(1, one.ndim) if one.shape[axis] != sample.shape[axis]]
    if not 1 <= len(differs) <= 2 or any(one.shape[axis] < sample.shape[axis] for axis in differs):
        return None
    shares = [sample.shape[axis] / one.shape[axis] for axis in differs]
    axis = differs[shares.index(min(shares))]
    if len(differs) == 2 and max(shares) <= GIVEN:
        return None
    length = sample.shape[axis]
    for starts in product(*(range(one.shape[other] - sample.shape[other] + 1) for other in differs)):
        part = one
        for other, start in zip(differs, starts, strict=True):
            part = part.narrow(other, start, sample.shape[other])
        if same_direction(part, sample):
            first = starts[differs.index(axis)]
            return Joined(axis, first, length, tuple(one.narrow(axis, first, length).shape[1:]))
    return None


def same_direction(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float(torch.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0)) > ALIKE


def layouts(sample: torch.Tensor, dimensions: int) -> Iterator[torch.Tensor]:
    """A scheduler's sample in the orders in which pipelines pass it on."""
    if sample.ndim == dimensions:
        yield sample
        if dimensions == 5:
            yield sample.transpose(1, 2)
