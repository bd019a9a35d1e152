"""What is known parameter by parameter, as one number per unit."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from gfprune_cli.flow.mask import MaskedModel, Masks, leaves, masked_dimension

# (parameter, a quantity of its shape) -> what is added up
Measure = Callable[[str, torch.Tensor], torch.Tensor]


class UnitSums:
    """Sums over the producers of each unit; every parameter of a block produces it.

    Args:
        measure: of what is given, what is added up.
    """

    def __init__(self, masked: MaskedModel, measure: Measure) -> None:
        self.measure = measure
        self.weights = tuple(masked.weights)
        device = next(iter(masked.weights.values())).device
        self.totals = {
            group.name: torch.zeros(group.units, dtype=torch.float64, device=device)
            for group in masked.groups
        }
        self.blocks = tuple(group for group in masked.groups if group.is_block)
        self.places: dict[str, list[tuple[str, int, torch.Tensor, torch.Tensor]]] = {}
        for group in masked.groups:
            for member in () if group.is_block else group.producers:
                rows, units = member.positions.to(device), (member.channels // group.unit_size).to(device)
                place = group.name, masked_dimension(member), rows, units
                for key in leaves(member.module):
                    self.places.setdefault(key, []).append(place)

    def names(self) -> list[str]:
        """Of the parameters that produce a unit."""
        return [
            name
            for name in self.weights
            if name in self.places or any(block.holds(name) for block in self.blocks)
        ]

    @torch.no_grad()
    def add(self, name: str, given: torch.Tensor) -> None:
        """Add a quantity given for each number of a parameter."""
        blocks = [block.name for block in self.blocks if block.holds(name)]
        places = self.places.get(name, ())
        if not blocks and not places:
            return
        values = self.measure(name, given)
        for block in blocks:
            self.totals[block] += values.double().sum()
        for group, dimension, rows, units in places:
            per_row = values.double().movedim(dimension if values.ndim > 1 else 0, 0)
            per_row = per_row.flatten(1).sum(1) if values.ndim > 1 else per_row
            self.totals[group].index_add_(0, units, per_row[rows])

    def total(self) -> Masks:
        """Group name -> [units] float64 on the CPU."""
        return {name: total.cpu() for name, total in self.totals.items()}


def shares(
    names: Sequence[str], weights: Mapping[str, torch.Tensor], turns: int
) -> Iterator[dict[str, None]]:
    """The names, in order, in so many parts of about the same size in numbers, or fewer."""
    total = sum(weights[name].numel() for name in names)
    before, parts = 0, [dict[str, None]() for _ in range(turns)]
    for name in names:
        parts[min(turns - 1, before * turns // max(1, total))][name] = None
        before += weights[name].numel()
    return (part for part in parts if part)


def unit_sums(masked: MaskedModel, values: Mapping[str, torch.Tensor], measure: Measure) -> Masks:
    """The sums of quantities that are all there."""
    sums = UnitSums(masked, measure)
    for name, value in values.items():
        sums.add(name, value)
    return sums.total()
