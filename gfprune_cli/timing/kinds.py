"""Which layers run, and at which sizes: what decides the time of a layer beside its widths."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.structure.norms import NORMS, is_feature_norm
from gfprune_cli.structure.trace import (
    CONVOLUTIONS,
    KEYS,
    QUERIES,
    Shapes,
    hooked,
    is_attention,
    is_depthwise,
    is_fused,
    is_linear_attention,
    observe_attention,
    positions_of,
)

ATTENTION = "attention"


@dataclass(frozen=True)
class Kind:
    """Layers that differ in their widths alone.

    Args:
        operator: "conv", "depthwise", "linear" or "attention".
        shape: of the input without its channels: batch first, then height and width, or tokens.
        kernel, stride, padding, dilation, groups: of a convolution.
        head: of attention: channels of a head; 0 where there is one head, which narrows.
        keys: of attention: how many each query meets.
    """

    operator: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    head: int = 0
    keys: int = 0

    def heads(self, width: int) -> int:
        """Of attention so wide."""
        return max(1, width // self.head) if self.head else 1

    def weight_shape(self, out: int, into: int) -> tuple[int, ...]:
        """Of a layer at these widths; () of attention, which has none."""
        if self.operator == ATTENTION:
            return ()
        return out, 1 if self.operator == "depthwise" else into // self.groups, *self.kernel

    @property
    def label(self) -> str:
        """The name of its table: "conv 3x3 of 1x32x32"."""
        words = [self.operator]
        if self.kernel:
            words.append(crossed(self.kernel))
        for name in ("stride", "dilation"):
            if any(size > 1 for size in getattr(self, name)):
                words.append(f"{name} {crossed(getattr(self, name))}")
        if self.padding != tuple((size - 1) // 2 for size in self.kernel):
            words.append(f"padding {crossed(self.padding)}")
        if self.groups > 1 and self.operator != "depthwise":
            words.append(f"groups {self.groups}")
        if self.operator == ATTENTION:
            words.append(f"head {self.head} keys {self.keys}")
        return " ".join([*words, "of", crossed(self.shape)])


def crossed(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


@dataclass
class Run:
    """What one pass showed of a module.

    Args:
        kind: None of a norm: it has no table.
        calls: how often it ran.
        places: numbers that it puts out per channel, all calls together.
    """

    kind: Kind | None
    calls: int = 0
    places: int = 0


@torch.no_grad()
def layers_run(network: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Run]:
    """What a pass runs, by the name of the module: convolutions, linear layers, norms, attention products.

    Args:
        network: on any device, the meta device included.
        inputs: keyword arguments of one pass.
    """
    found: dict[str, Run] = {}
    modules = network.named_modules()
    with hooked(handle for name, module in modules for handle in watch(name, module, found)):
        network(**inputs, **in_tuples(network))
    return found


def watch(name: str, module: Any, found: dict[str, Run]) -> Iterator[Any]:
    """Forward hooks that note what one module does."""

    def note(kind: Kind | None, places: int) -> None:
        run = found.setdefault(name, Run(kind))
        run.calls, run.places = run.calls + 1, run.places + places

    if isinstance(module, (*CONVOLUTIONS, nn.Linear, *NORMS)) or is_feature_norm(module):
        yield module.register_forward_hook(
            lambda layer, args, out: note(layer_kind(layer, args), positions_of(layer, out))
        )
    if is_attention(module) or is_fused(module):

        def meet(seen: Shapes) -> None:
            if seen and len(next(iter(seen.values()))) == 3:
                note(product(module, seen), 0)

        yield from observe_attention(module, meet)


def layer_kind(layer: Any, given: tuple[torch.Tensor, ...]) -> Kind | None:
    """None of a norm."""
    if isinstance(layer, nn.Linear):
        return Kind("linear", (given[0].shape[:-1].numel(),))
    if not isinstance(layer, CONVOLUTIONS):
        return None
    batch, _, *size = given[0].shape
    padding = layer.padding if isinstance(layer.padding, tuple) else (0,) * len(size)
    return Kind(
        "depthwise" if is_depthwise(layer) else "conv",
        (batch, *size),
        layer.kernel_size,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups if not is_depthwise(layer) else 1,
    )


def product(attention: Any, seen: Shapes) -> Kind | None:
    """What meets in an attention; None where that is linear in the tokens."""
    first = next(iter(seen.values()))
    queries, keys = (sum(seen[leaf][1] for leaf in leaves if leaf in seen) for leaves in (QUERIES, KEYS))
    width = attention.inner_dim if is_fused(attention) else attention.to_q.out_features
    head = width // attention.heads if attention.heads > 1 else 0
    linear = is_linear_attention(attention)
    return None if linear else Kind(ATTENTION, (first[0], queries), head=head, keys=keys)
