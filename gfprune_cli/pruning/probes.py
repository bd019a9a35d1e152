"""Timesteps and pooled conditions that a network may meet, without the samples: what folding is fitted to.

Timesteps cover the range of the training schedule, on its own levels and between them. Conditions are those
that were recorded; where all of them can be listed (class labels), they are, and numbers (guidance, sizes)
are varied beyond what one pipeline passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gfprune_cli.diffusion.conditions import Condition, Conditions
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.process import NoisingProcess
from gfprune_cli.structure.modulation import Hide, Table

NUMBERS = 8  # entries up to which a condition is a few numbers, not a vector of features
HELD_OUT = 4  # one condition in so many is kept for the check, and of the rest one for choosing ranks
FIND = "find"  # purpose of the pass that finds layers
VECTOR = 3  # dimensions of a condition [rows, branches, features]; tokens have more


@dataclass(frozen=True)
class Probes:
    """Draws noise levels and conditions.

    Args:
        process: of the run.
        condition: of the images of the run, all of them.
        shape: of one sample, without the batch.
        device: of the network.
        seed: of the run.
        entries: condition -> how many values it can have; filled by `know`.
        discrete: timesteps are looked up in a table, so that there is nothing between them.
    """

    process: NoisingProcess
    condition: Condition
    shape: tuple[int, ...]
    device: torch.device
    seed: int
    entries: Mapping[str, int] = field(default_factory=dict)
    discrete: bool = False

    @property
    def branches(self) -> int:
        return self.condition.branches if isinstance(self.condition, Conditions) else 1

    @property
    def features(self) -> int:
        """Of the widest pooled vector; 0 where there is none."""
        tensors = self.condition.tensors.values() if isinstance(self.condition, Conditions) else ()
        return max((tensor.shape[-1] for tensor in tensors if is_pooled(tensor)), default=0)

    def schedule(self) -> torch.Tensor:
        """[T] what the network is told at each level of the training schedule."""
        return self.process.timesteps(torch.arange(self.process.steps)).cpu()

    def span(self) -> tuple[float, float]:
        """The smallest and the largest of it."""
        times = self.schedule().double()
        return float(times.min()), float(times.max())

    def timesteps(self, purpose: str, count: int) -> torch.Tensor:
        """[count] over the whole range: every other one a level of the schedule, the others anywhere.

        Both ends are among them.
        """
        schedule, (low, high) = self.schedule(), self.span()
        source = generator(self.seed, "probe times", purpose)
        share = (torch.arange(count) + torch.rand(count, generator=source)) / count
        levels = schedule[(share * len(schedule)).long().clamp_max(len(schedule) - 1)]
        levels[0], levels[-1] = schedule[0], schedule[-1]
        if self.discrete or purpose == FIND:  # which of the two it is, that pass tells
            return levels
        between = (low + share * (high - low)).to(torch.float32)
        return torch.where(torch.arange(count) % 2 == 0, levels.float(), between)

    def know(self, tables: Sequence[Table], given: torch.Tensor, condition: Condition) -> "Probes":
        """The same, with what the embeddings that a pass looked up tell of its timesteps and labels."""
        flat = named_values(condition)
        entries, discrete = dict(self.entries), self.discrete
        for table in tables:
            times = given.repeat_interleave(self.branches).to(table.given)
            discrete |= table.given.shape == times.shape and bool((table.given == times).all())
            for name, value in flat.items():
                same = value.flatten().to(table.given)
                if same.shape == table.given.shape and bool((same == table.given).all()):
                    entries[name] = table.entries
        return replace(self, entries=entries, discrete=discrete)

    def conditions(self, purpose: str, count: int, hide: Hide | None = None) -> Condition:
        """Those of `count` samples.

        Args:
            purpose: "fit", "choose" and "check" see different conditions where there are enough of them.
            hide: what tokens become; None leaves them as they are.
        """
        source = generator(self.seed, "probe conditions", purpose)
        condition = self.condition
        if condition is None:
            return None
        if isinstance(condition, torch.Tensor):
            return self.labels("", count, source).to(self.device)
        pool = torch.tensor(pool_of(condition, purpose))
        chosen = pool[torch.randint(len(pool), (count,), generator=source)]
        tensors = {
            name: self.rows(name, tensor, chosen, source, hide) for name, tensor in condition.tensors.items()
        }
        if purpose == "fit":
            for name, tensor in condition.tensors.items():
                if is_pooled(tensor):
                    tensors[name] = spread(tensors[name], tensor[pool], source)
        return replace(condition.of_rows(chosen.tolist()), tensors=tensors, rows=tuple(range(count)))

    def several(self, parts: Mapping[str, int], hide: Hide) -> tuple[torch.Tensor, Condition]:
        """Timesteps and conditions of several purposes -> counts, one behind the other; tokens hidden.

        For the network alone: a denoiser that takes what it returns is left out.
        """
        times = torch.cat([self.timesteps(purpose, count) for purpose, count in parts.items()])
        found = [self.conditions(purpose, count, hide) for purpose, count in parts.items()]
        first = found[0]
        if isinstance(first, torch.Tensor):
            return times, torch.cat([one for one in found if isinstance(one, torch.Tensor)])
        if first is None:
            return times, None
        every = [one.tensors for one in found if isinstance(one, Conditions)]
        tensors = {name: torch.cat([one[name] for one in every]) for name in first.tensors}
        return times, replace(first, tensors=tensors, rows=tuple(range(len(times))), receiver=None)

    def rows(
        self,
        name: str,
        tensor: torch.Tensor,
        chosen: torch.Tensor,
        source: torch.Generator,
        hide: Hide | None,
    ) -> torch.Tensor:
        """[count, branches, ...] of one condition."""
        if tensor.ndim > VECTOR:
            if hide is None:
                return tensor[chosen]
            return hide(tensor[:1].to(self.device)).expand(len(chosen), *tensor.shape[1:])
        found = tensor[chosen]
        if name in self.entries:
            found[:, -1] = self.labels(name, len(chosen), source).view(-1, *[1] * (found.ndim - 2)).to(found)
        elif is_number(tensor):
            found = varied(found, source)
        return found

    def labels(self, name: str, count: int, source: torch.Generator) -> torch.Tensor:
        """[count] values of a listed condition, each as often as the others, in random order."""
        held: Any = self.condition
        entries = self.entries.get(name) or int(held.max()) + 1
        order = torch.cat([torch.randperm(entries, generator=source) for _ in range(-(-count // entries))])
        return order[:count]

    def ranges(self) -> dict[str, Any]:
        """What was covered, for the record."""
        condition, low_high = self.condition, list(self.span())
        found: dict[str, Any] = {"timesteps": low_high, "between_levels": not self.discrete}
        if isinstance(condition, torch.Tensor):
            found["class_labels"] = {"values": self.entries.get("") or int(condition.max()) + 1}
        if not isinstance(condition, Conditions):
            return found
        for name, tensor in condition.tensors.items():
            if name in self.entries:
                found[name] = {"values": self.entries[name]}
            elif tensor.ndim <= VECTOR and is_number(tensor):
                found[name] = {"range": [0.0, 2 * float(tensor.abs().max())]}
            elif tensor.ndim <= VECTOR:
                found[name] = {"recorded": len(set(pool_of(condition, "")))}
        return found


def spread(found: torch.Tensor, recorded: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Every second sample another vector, normal, with mean and spread of each feature as recorded."""
    mean, deviation = recorded.mean(0), recorded.std(0, correction=0)
    other = mean + deviation * torch.randn(found.shape, generator=source).to(found)
    every = torch.rand(len(found), generator=source).view(-1, *[1] * (found.ndim - 1)) < 0.5
    return torch.where(every, other, found)


def is_pooled(tensor: torch.Tensor) -> bool:
    """Whether a condition [rows, branches, features] is one vector of features a prompt."""
    return tensor.ndim == VECTOR and tensor.is_floating_point() and not is_number(tensor)


def is_number(tensor: torch.Tensor) -> bool:
    """Whether a condition [rows, branches, ...] is a few numbers that do not depend on the prompt."""
    few = tensor[0, 0].numel() <= NUMBERS and tensor.is_floating_point()
    return few and bool((tensor == tensor[:1]).all())


def varied(numbers: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Every second sample with other numbers, between 0 and twice the largest of its own."""
    most = 2 * numbers.flatten(1).abs().amax(1).view(-1, *[1] * (numbers.ndim - 1))
    other = torch.rand(numbers[:, :1].shape, generator=source).to(numbers) * most
    every = torch.rand(len(numbers), generator=source).view(-1, *[1] * (numbers.ndim - 1)) < 0.5
    return torch.where(every, other.expand_as(numbers), numbers)


def pool_of(condition: Conditions, purpose: str) -> list[int]:
    """Rows for one purpose: a quarter for the check, of the rest a quarter to choose ranks on, others to fit.

    All of them for each, where there are too few.
    """
    rows = range(len(condition)) if condition.rows is None else condition.rows
    every = sorted(set(rows))
    if purpose not in ("fit", "choose", "check") or len(every) < HELD_OUT**2:
        return every
    check = every[HELD_OUT - 1 :: HELD_OUT]
    rest = [row for row in every if row not in set(check)]
    choose = rest[HELD_OUT - 1 :: HELD_OUT]
    return {"check": check, "choose": choose, "fit": [row for row in rest if row not in set(choose)]}[purpose]


def named_values(condition: Condition) -> dict[str, torch.Tensor]:
    """Listed conditions by name; that of a network that is given labels alone has none."""
    if isinstance(condition, torch.Tensor):
        return {"": condition}
    if condition is None:
        return {}
    rows = list(range(len(condition)) if condition.rows is None else condition.rows)
    return {name: t[rows] for name, t in condition.tensors.items() if not t.is_floating_point()}
