"""From a transformer to its channel groups, by rules over the building blocks of diffusers.

groups, trace = discover_transformer(model)          # any device, the meta device included

Attention heads (`structure.heads`) and feed-forward units (`structure.feedforward`) are found from the
modules that make them up, not from the class of the model; the residual stream keeps its width, unless it
is asked for (`structure.width`).
"""

import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure.feedforward import feedforward_groups, units_of
from gfprune_cli.structure.fused_blocks import fused_groups
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.heads import POSITIONAL, Rotary, head_groups
from gfprune_cli.structure.trace import Trace, hooked, is_attention, is_fused, observe
from gfprune_cli.structure.tracing import tables_as_before
from gfprune_cli.structure.width import width_group

ROTARY_NAMES = ("rotary", "rope", "freqs")


def is_transformer(model: nn.Module) -> bool:
    """Whether a denoiser is a stack of transformer blocks: attention or their units, no convolutions."""
    kinds = {type(module).__name__ for module in model.modules()}
    return not any(kind.startswith("ResnetBlock") for kind in kinds) and any(
        is_attention(module) or units_of(module) is not None for module in model.modules()
    )


def discover_transformer(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, width: bool = False
) -> tuple[tuple[ChannelGroup, ...], Trace]:
    """Find the channel groups of a diffusion transformer.

    Args:
        inputs: keyword arguments of `forward` for one sample; None for those that the configuration implies.
        width: the residual stream is a group too.

    Returns:
        (groups in the order in which the network runs them, the trace of the forward pass).

    Raises:
        GfpruneError: the network does not run on these inputs, or a module stands in the way of its width.
    """
    trace, rotary = trace_forward(model, example_inputs(model) if inputs is None else inputs)
    found = [*head_groups(model, rotary), *fused_groups(model, rotary), *feedforward_groups(model)]
    if width:
        found.append(width_group(model))
    order = {name: index for index, name in enumerate(trace.positions)}
    run = [group for group in found if group.members[0].module in order]
    return tuple(sorted(run, key=lambda group: order[group.members[0].module])), trace


def trace_forward(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Trace, Rotary]:
    """One forward pass: positions, attention products, and the rotary embeddings of each attention.

    On the meta device where that is possible; with the weights where shapes depend on values.
    """

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    parts = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    state = {name: to_meta(tensor) for name, tensor in chain(*parts)}
    attempts: list[tuple[dict[str, Any], dict[str, Any]]] = [(state, tree_map(to_meta, dict(inputs)))]
    if not any(parameter.is_meta for parameter in model.parameters()):
        attempts.append(({}, dict(inputs)))
    error: Exception | None = None
    for held, arguments in attempts:
        trace, rotary = Trace(), Rotary()
        watching = hooked(chain(observe(model, trace), observe_rotary(model, rotary)))
        try:
            with watching, torch.no_grad(), tables_as_before(model):
                functional_call(model, dict(held), (), {**arguments, "return_dict": False})
            return trace, rotary
        except Exception as raised:  # whatever a model's forward may raise
            error = raised
    assert error is not None
    raise GfpruneError(f"cannot trace {type(model).__name__}: {first_line(error)}") from error


def observe_rotary(model: nn.Module, rotary: Rotary) -> Iterable[Any]:
    """Hooks that note the shapes of the rotary embeddings which every attention receives."""
    for name, module in model.named_modules():
        if not (is_attention(module) or is_fused(module)):
            continue
        signature = inspect.signature(module.forward)

        def note(_module: Any, args: Any, kwargs: Any, name: str = name, signature: Any = signature) -> None:
            given = {
                f"{POSITIONAL}{key}": value for key, value in signature.bind_partial(*args).arguments.items()
            }
            given |= kwargs | (kwargs.get("cross_attention_kwargs") or {})
            for key, value in given.items():
                if any(part in key for part in ROTARY_NAMES):
                    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
                    rotary.setdefault(name, {})[key] = [tuple(tensor.shape) for tensor in tensors]

        yield module.register_forward_pre_hook(note, with_kwargs=True)
