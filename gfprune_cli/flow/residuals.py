"""What the outputs of a layer are added to, and where that can be seen before the layer runs.

A residual block returns its input plus what its last layer gives. To make up for what the input has lost, one
has to know it when the layer is fitted: it is the input or output of some module that ran before. One pass of
the network under a function mode tells which.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gfprune_cli.structure.removal import skeleton
from gfprune_cli.structure.trace import hooked

KEEPS = {  # the same numbers in another shape
    *("reshape", "view", "permute", "transpose", "contiguous", "flatten", "unflatten", "dropout", "to"),
    *("float", "squeeze", "unsqueeze", "movedim"),
}
ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}


@dataclass(frozen=True)
class Carrier:
    """A module that is given a stream, or returns it.

    Args:
        module: its name.
        argument: position or keyword of the stream among its inputs; None for its output.
    """

    module: str
    argument: int | str | None

    @property
    def key(self) -> str:
        return f"{self.module} {self.argument}"

    def watch(self, module: nn.Module, streams: MutableMapping[str, torch.Tensor]) -> Any:
        """A hook that keeps the stream of the pass under `key`."""

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            streams[self.key] = (
                args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
            )

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            streams[self.key] = output

        if self.argument is None:
            return module.register_forward_hook(after)
        return module.register_forward_pre_hook(before, with_kwargs=True)


class Additions(TorchFunctionMode):
    """Follows the outputs of layers through changes of shape to the additions that they end in."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Any] = []  # or a later tensor could take the identity of an earlier one
        self.origin: dict[int, str] = {}  # tensor -> the layer whose output it is
        self.carrier: dict[int, tuple[int, Carrier]] = {}  # tensor -> when it was seen, and where
        self.ran: dict[str, int] = {}  # layer -> when it was called
        self.found: dict[str, Carrier] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if not isinstance(output, torch.Tensor):
            return output
        self.alive.append(output)
        if name in KEEPS and args and id(args[0]) in self.origin:
            self.origin[id(output)] = self.origin[id(args[0])]
        if name in ADDS and len(args) > 1 and all(isinstance(one, torch.Tensor) for one in args[:2]):
            self.added(args[0], args[1])
        return output

    def added(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """The layer that ran last may make up for what the other summand has lost."""
        if first.shape != second.shape:
            return
        pairs = [(self.origin.get(id(one)), other) for one, other in ((first, second), (second, first))]
        layers = [(self.ran[layer], layer, other) for layer, other in pairs if layer is not None]
        if not layers:
            return
        ran, layer, other = max(layers, key=lambda entry: entry[0])
        seen = self.carrier.get(id(other))
        if seen is not None and seen[0] < ran:
            self.found.setdefault(layer, seen[1])


def find_residuals(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Carrier]:
    """Layer -> where the stream that its output is added to can be seen when it runs.

    All that is computed stays until the end, so a network without weights is asked, on the meta device;
    where values decide what a network computes, itself.

    Args:
        inputs: keyword arguments of one forward pass.
    """
    empty = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), dict(inputs))
    try:
        return seen_residuals(skeleton(model), empty)
    except Exception:  # of its own code, which may look at values
        return seen_residuals(model, inputs)


def seen_residuals(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Carrier]:
    """The same from a pass of this very network."""
    additions, hooks, clock = Additions(), [], iter(range(10**9))

    def given(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        now = next(clock)
        additions.ran[name] = now
        for argument, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor):
                additions.alive.append(value)
                additions.carrier.setdefault(id(value), (now, Carrier(name, argument)))

    def returned(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            additions.alive.append(output)
            additions.carrier.setdefault(id(output), (next(clock), Carrier(name, None)))
            if hasattr(module, "weight"):
                additions.origin[id(output)] = name

    for name, module in model.named_modules():
        if not name:
            continue
        hooks.append(module.register_forward_pre_hook(partial(given, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(returned, name)))
    with hooked(hooks), torch.no_grad(), additions:
        model(**inputs)
    return additions.found


def as_rows(
    stream: torch.Tensor, channels: int, shape: Sequence[int], index: torch.Tensor
) -> torch.Tensor | None:
    """[rows, channels] of a stream at the positions of a layer's outputs; None where the two do not fit.

    Args:
        shape: of the layer's outputs: images [N, C, ...] or tokens [..., C].
    """
    if stream.shape[-1] == channels and stream.ndim == 3:
        last = stream
    elif stream.ndim > 2 and stream.shape[1] == channels:
        last = stream.movedim(1, -1)
    else:
        return None
    flat = last.reshape(-1, channels)
    if flat.shape[0] * channels != torch.Size(shape).numel():
        return None
    return flat[index.to(stream.device)].float()
