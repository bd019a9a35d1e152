"""What one forward pass of one sample shows: how often every weight is applied."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.structure.norms import is_feature_norm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUSED = "to_qkv_mlp_proj"
QUERIES = ("to_q", "add_q_proj", FUSED)
KEYS = ("to_k", "add_k_proj", FUSED)
Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Trace:
    """What one forward pass of one sample showed.

    Args:
        positions: module name -> output positions (pixels, frames x pixels, or tokens) each weight is applied
            at, in the order in which the network runs them.
        attention: attention module name -> multiply-accumulates of its two products per query channel.
    """

    positions: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """In the block these hooks are there; they are made when it begins."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextmanager
def gradients_as_before(model: nn.Module) -> Iterator[None]:
    """Put back which parameters have gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def first_given(args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a layer reads, in whichever way it is called."""
    return args[0] if args else next(iter(named.values()))


def layer_hook(name: str, layer: nn.Module, visit: Callable[..., Any], *, after: bool) -> Any:
    """A hook that calls `visit(name, layer, input)`, or with the output, in whose place it may return one."""
    if after:
        return layer.register_forward_hook(
            lambda layer, given, named, output: visit(name, layer, first_given(given, named), output),
            with_kwargs=True,
        )
    return layer.register_forward_pre_hook(
        lambda layer, given, named: visit(name, layer, first_given(given, named)), with_kwargs=True
    )


def is_attention(module: Any) -> bool:
    """Whether a module projects queries and keys and splits them into `heads`, as those of diffusers do."""
    return (
        isinstance(getattr(module, "to_q", None), nn.Linear)
        and isinstance(getattr(module, "to_k", None), nn.Linear)
        and isinstance(getattr(module, "heads", None), int)
    )


def is_fused(module: Any) -> bool:
    """Whether a module makes queries, keys, values and feed-forward units by one projection."""
    numbers = ("heads", "inner_dim", "mlp_hidden_dim", "mlp_mult_factor")
    layers = (FUSED, "to_out")
    return all(isinstance(getattr(module, leaf, None), nn.Linear) for leaf in layers) and all(
        isinstance(getattr(module, leaf, None), int) for leaf in numbers
    )


def is_depthwise(module: Any) -> bool:
    """Whether a module filters each of its channels by itself."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1


def is_linear_attention(attention: Any) -> bool:
    """Whether an attention multiplies values by keys first, so that its cost is linear in the tokens."""
    return "LinearAttn" in type(getattr(attention, "processor", None)).__name__


def observe(model: nn.Module, trace: Trace) -> Iterator[Any]:
    """Forward hooks that fill a trace. What runs twice counts twice."""

    def count(name: str, positions: int) -> None:
        trace.positions[name] = trace.positions.get(name, 0) + positions

    def meet(name: str, attention: Any, seen: Shapes) -> None:
        queries, keys = (
            sum(seen[leaf][:-1].numel() for leaf in leaves if leaf in seen) for leaves in (QUERIES, KEYS)
        )
        cost = product_cost(attention, queries, keys)
        trace.attention[name] = trace.attention.get(name, 0) + cost

    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            yield module.register_forward_hook(
                lambda layer, _i, output, name=name: count(name, positions_of(layer, output))
            )
        if is_attention(module) or is_fused(module):
            yield from observe_attention(module, partial(meet, name, module))


def observe_attention(attention: Any, meet: Callable[[Shapes], None]) -> Iterator[Any]:
    """Hooks that tell which queries and keys meet in one attention module: their shapes, by projection.

    Joint attention has two projections of each, and every query meets every key.
    """
    seen: Shapes = {}

    def finish(_module: Any, _inputs: Any, _output: Any) -> None:
        meet(dict(seen))
        seen.clear()

    for leaf in dict.fromkeys((*QUERIES, *KEYS)):
        projection = getattr(attention, leaf, None)
        if isinstance(projection, nn.Linear):
            yield projection.register_forward_hook(
                lambda _m, _i, output, leaf=leaf: seen.update({leaf: output.shape})
            )
    yield attention.register_forward_hook(finish)


def positions_of(layer: nn.Module, output: torch.Tensor) -> int:
    """Positions of what a layer or norm puts out: pixels, or tokens."""
    tokens = isinstance(layer, nn.Linear) or is_feature_norm(layer)
    return output.numel() // output.shape[-1 if tokens else 1]


def product_cost(attention: Any, queries: int, keys: int) -> int:
    """Multiply-accumulates per query channel of (queries x keys) and (weights x values).

    Linear attention multiplies values by keys, with a row of ones for the denominator, and the result by
    the queries (arXiv 2410.10629, section 3.2).
    """
    if is_linear_attention(attention):
        head = attention.to_q.out_features // attention.heads
        return (head + 1) * (queries + keys)
    return 2 * queries * keys
