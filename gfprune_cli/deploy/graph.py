"""A graph to be written: what a tracer made, and how its inputs, outputs and free dimensions are called."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Axes = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Graph:
    """A traced network under the names that a runtime will see.

    Args:
        program: of named inputs.
        inputs: name -> free dimension -> its name; in the program's order.
        outputs: likewise; dimensions without a name here are called as those of the inputs that they equal.
    """

    program: torch.export.ExportedProgram
    inputs: Axes
    outputs: Axes
