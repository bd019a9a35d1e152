"""How wide the inputs of a network are: as wide as the layers that read them.

    with marked_inputs(model, {"encoder_hidden_states": MARKS[0]}):
        model(**inputs)                      # Wanted: encoder_hidden_states is 4096 wide

An argument whose width is asked for is given a width that fits nothing; the layer that it reaches says how
wide it has to be, however often it was repeated, folded into patches or joined to others before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

# None is near a multiple of a smaller one, so that what is left when it is taken away stays small.
MARKS = (10007, 23003, 52009, 124001, 294001)
SMALL_MARK = 211  # of samples, which have many places
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Wanted(Exception):
    """A layer that says how wide an argument has to be."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__(f"{name} is {width} wide")
        self.name, self.width = name, width


@contextmanager
def marked_inputs(model: nn.Module, marks: Mapping[str, int]) -> Iterator[list[nn.Module]]:
    """Raise `Wanted` where a width that is a mark reaches a layer; yields the layers that were reached.

    Args:
        marks: by argument.
    """
    reached: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[object, ...]) -> None:
        reached.append(module)
        axis, width = reading(module) or (0, 0)
        given = inputs[0] if inputs else None
        if not width or not isinstance(given, torch.Tensor) or not -given.ndim <= axis < given.ndim:
            return
        found = unmarked(given.shape[axis], width, marks)
        if found is not None:
            raise Wanted(*found)

    hooks = [
        module.register_forward_pre_hook(look) for module in model.modules() if reading(module) is not None
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def reading(module: nn.Module) -> tuple[int, int] | None:
    """The axis along which a layer reads, and how much it reads there; None for what has no such axis."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, CONVOLUTIONS):
        return 1, module.in_channels
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return (1 if isinstance(module, nn.GroupNorm) else -1), len(weight)
    return None


def unmarked(seen: int, width: int, marks: Mapping[str, int]) -> tuple[str, int] | None:
    """Which argument a layer of a width is given, and how wide that one has to be; None where none fits.

    Args:
        seen: what the layer is given: some times a mark, and the rest of what is joined to it.
    """
    parts = [(seen % mark, seen // mark, name) for name, mark in marks.items() if seen >= mark]
    if seen == width or not parts:
        return None
    rest, times, name = min(parts)
    found, left = divmod(width - rest, times)
    return (name, found) if found > 0 and not left else None
