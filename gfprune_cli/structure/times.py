"""The time of a network as a function of its widths: measured tables, read between their points.

NetAdapt (arXiv 1804.03230) sums measured times of layers; SPDY (arXiv 2201.13096) subtracts what no layer
accounts for from the target. Here a layer's time is a table over both of its widths, and what lies between
layers a slope per output and a constant per layer (see `timing.measure`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


BLOCKS = (8, 16)  # channels that kernels work on at once
Padding = tuple[float, float]
NONE: Padding = (0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Grid:
    """Milliseconds of one kind of layer at some widths.

    Args:
        out, into: ascending widths, at least two of each.
        ms: [out, into].
        out_padding, into_padding: how far a width between multiples of each of `BLOCKS` counts as the next
            one: 0 for not at all, 1 for fully.
    """

    out: Floats
    into: Floats
    ms: Floats
    out_padding: Padding = NONE
    into_padding: Padding = NONE

    def smoothed(self) -> "Grid":
        """No slower than any wider layer, which could stand in its place; what was slower was disturbed."""
        ms = self.ms
        for axis in (0, 1):
            ms = np.flip(np.minimum.accumulate(np.flip(ms, axis), axis), axis)
        return replace(self, ms=ms)


class LayerTimes:
    """Milliseconds of the layers of a cost model.

    Args:
        grids: of each layer; None where only what lies between layers counts.
        calls: how often each layer runs.
        slopes: milliseconds per output of each layer.
        constants: milliseconds of each layer at any width.
    """

    def __init__(
        self, grids: Sequence[Grid | None], calls: Sequence[int], slopes: Floats, constants: Floats
    ) -> None:
        nothing = Grid(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.zeros((2, 2)))
        found = [grid or nothing for grid in grids]
        points = max(max(len(grid.out), len(grid.into)) for grid in found)
        # short tables end in points that no width reaches
        self.out = np.array([lengthened(grid.out, points) for grid in found])
        self.into = np.array([lengthened(grid.into, points) for grid in found])
        self.ms = np.array(
            [np.pad(grid.ms, [(0, points - size) for size in grid.ms.shape], "edge") for grid in found]
        )
        self.last = np.array([(len(grid.out) - 2, len(grid.into) - 2) for grid in found])
        self.paddings = np.array([(grid.out_padding, grid.into_padding) for grid in found])
        self.calls, self.slopes, self.constants = np.array(calls, np.float64), slopes, constants

    def of(self, layers: Ints, out: Ints, into: Ints) -> Floats:
        """Milliseconds of these layers at these widths; bilinear between points, and beyond the last two."""
        row, right = place(self.out, self.last[:, 0], layers, filled_up(out, self.paddings[layers, 0]))
        column, up = place(self.into, self.last[:, 1], layers, filled_up(into, self.paddings[layers, 1]))
        low = self.ms[layers, row, column] * (1 - up) + self.ms[layers, row, column + 1] * up
        high = self.ms[layers, row + 1, column] * (1 - up) + self.ms[layers, row + 1, column + 1] * up
        table = np.maximum(low * (1 - right) + high * right, 0)
        found: Floats = table * self.calls[layers] + self.slopes[layers] * out + self.constants[layers]
        return found

    def launching(self, layers: Ints) -> float:
        """Milliseconds that these layers take however narrow they are: at no width, as the tables go on."""
        none = np.zeros(len(layers), np.int64)
        narrowest = self.ms[layers, 0, 0] * self.calls[layers] + self.constants[layers]
        return float(np.minimum(self.of(layers, none, none), narrowest).sum())


def filled_up(widths: Ints, paddings: Floats) -> Floats:
    """Widths as a kernel sees them that works on blocks of channels.

    Args:
        paddings: [widths, 2], see `Grid`.
    """
    small, large = BLOCKS
    up = -widths % small
    more = -(widths + up) % large
    found: Floats = widths + up * paddings[:, 0] + more * paddings[:, 1]
    return found


def lengthened(widths: Floats, points: int) -> Floats:
    return np.concatenate([widths, widths[-1] + np.arange(1, points - len(widths) + 1)])


def place(grids: Floats, last: Ints, layers: Ints, widths: Floats) -> tuple[Ints, Floats]:
    """(the point below each width, the share of the way to the next one)."""
    points = grids[layers]
    below = np.clip((points <= widths[:, None]).sum(1) - 1, 0, last[layers])
    every = np.arange(len(layers))
    start = points[every, below]
    return below, (widths - start) / (points[every, below + 1] - start)
