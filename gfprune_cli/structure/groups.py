"""What may be removed: channel groups, their units and the selection cells that norms impose."""

from dataclasses import dataclass
from typing import Literal

import torch

Side = Literal["out", "in"]
Kind = Literal["conv", "linear", "norm", "embedding", "rotary", "parameter", "gate"]


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one module that reads or writes the channels of a group.

    Args:
        module: dotted name in the model.
        side: "out" for what the module produces (a norm's weight and bias included), "in" for what it reads.
        kind: layer type.
        positions: [n] indices in the module's dimension.
        channels: [n] the group's channel at each of those positions.
    """

    module: str
    side: Side
    kind: Kind
    positions: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Coupled slices that must go together, made of `units` of `unit_size` neighbouring channels.

    Args:
        name: the producer the group is named after.
        channels: number of channels before pruning.
        unit_size: channels per unit (1, or the head dimension).
        cells: [cells, units per cell] unit indices; every cell keeps the same number of units, so that
            each group of the norm behind it keeps the same number of channels.
        members: every coupled slice.
        stack: of a group whose one unit is a whole residual block: the list of blocks that it is one of.
    """

    name: str
    channels: int
    unit_size: int
    cells: torch.Tensor
    members: tuple[Member, ...]
    stack: str = ""

    @property
    def is_block(self) -> bool:
        """Whether its one unit is a whole residual block, or several that go together."""
        return bool(self.stack)

    def holds(self, name: str) -> bool:
        """Whether a module or tensor is part of one of its blocks."""
        return any(name.startswith(f"{member.module}.") for member in self.members)

    @property
    def units(self) -> int:
        return self.channels // self.unit_size

    @property
    def step(self) -> int:
        """Channels that leave together when every cell loses one unit."""
        return len(self.cells) * self.unit_size

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members that create the activation: at mask 0 it is exactly zero."""
        return tuple(member for member in self.members if member.side == "out")

    def kept_channels(self, kept_units: torch.Tensor) -> torch.Tensor:
        """Sorted channel indices of the kept units, given as bool [units]."""
        return torch.nonzero(kept_units.repeat_interleave(self.unit_size)).flatten()


def select(group: ChannelGroup, scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` channels of a group with the highest scores, chosen independently inside each cell.

    Args:
        scores: [units], higher means more important.
        keep: channels to keep, a multiple of `group.unit_size`. Where it is no multiple of `group.step`,
            the units left over go to the cells whose next unit scores highest.

    Returns:
        bool [units]; ties fall to the lower index, on every device.
    """
    per_cell, left_over = divmod(keep // group.unit_size, len(group.cells))
    scores = scores.double().cpu()
    order = torch.sort(scores[group.cells], dim=1, descending=True, stable=True).indices
    ranked = group.cells.gather(1, order)
    kept = torch.zeros(group.units, dtype=torch.bool)
    kept[ranked[:, :per_cell].flatten()] = True
    if left_over:
        following = ranked[:, per_cell]
        best = torch.sort(scores[following], descending=True, stable=True).indices[:left_over]
        kept[following[best]] = True
    return kept
