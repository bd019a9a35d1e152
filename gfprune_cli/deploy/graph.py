"""A graph to be written: what a tracer made, and how its inputs, outputs and free dimensions are called."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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

    def described(self, tensors: Iterable[torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Name -> type and shape of the inputs, of which these are some, for record and model card."""
        return {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [axes.get(axis, size) for axis, size in enumerate(tensor.shape)],
            }
            for (name, axes), tensor in zip(self.inputs.items(), tensors, strict=True)
        }
