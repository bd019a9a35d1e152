"""Physical removal: the narrow network that computes what the masked one computes.

Weights are sliced by name and loaded into the class that the checkpoint will name, so what is measured
here is what users load.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.structure.blocks import depth_of
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.norms import NORMS, group_labels

Kept = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ModuleCut:
    """Positions of one module that stay, sorted; None where the dimension is whole."""

    out: torch.Tensor | None = None
    into: torch.Tensor | None = None


def cuts_of(model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Kept) -> dict[str, ModuleCut]:
    """What stays of every module that loses something.

    Args:
        kept: group name -> bool [units].
    """
    alive: dict[tuple[str, str], torch.Tensor] = {}
    for group in groups:
        if group.stack or bool(kept[group.name].all()):
            continue
        channel_alive = kept[group.name].repeat_interleave(group.unit_size)
        for member in group.members:
            key = (member.module, member.side)
            if key not in alive:
                alive[key] = torch.ones(dimension_size(model, member.module, member.side), dtype=torch.bool)
            alive[key][member.positions] &= channel_alive[member.channels]
    cuts: dict[str, ModuleCut] = {}
    for name in dict.fromkeys(module for module, _ in alive):
        out, into = alive.get((name, "out")), alive.get((name, "in"))
        cuts[name] = ModuleCut(
            None if out is None else torch.nonzero(out).flatten(),
            None if into is None else torch.nonzero(into).flatten(),
        )
    return cuts


def dimension_size(model: nn.Module, name: str, side: str) -> int:
    """Size of one dimension of a module."""
    module = model.get_submodule(name)
    if isinstance(module, NORMS):
        return module.num_channels
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if side == "out" else weight.shape[1]


def slice_state(model: nn.Module, cuts: Mapping[str, ModuleCut]) -> dict[str, torch.Tensor]:
    """The state dict that is left, as new contiguous tensors under the same names."""
    state = {}
    for key, tensor in model.state_dict().items():
        cut = cuts.get(key.rpartition(".")[0], ModuleCut())
        embedding = isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Embedding)
        if cut.out is not None:
            tensor = tensor.index_select(1 if embedding else 0, cut.out.to(tensor.device))
        if cut.into is not None and tensor.ndim > 1:
            tensor = tensor.index_select(1, cut.into.to(tensor.device))
        state[key] = tensor.clone(memory_format=torch.contiguous_format)
    for name, factor in attention_scales(model, cuts).items():
        for key in (f"{name}.to_q.weight", f"{name}.to_q.bias"):
            if key in state:
                state[key] *= factor
    return state


def attention_scales(model: nn.Module, cuts: Mapping[str, ModuleCut]) -> dict[str, float]:
    """Factors for the queries of attention layers whose head became narrower.

    The kernel divides by the square root of the head dimension that it sees, the masked network by that
    of the dense one.
    """
    factors = {}
    for name, module in model.named_modules():
        cut = cuts.get(f"{name}.to_q", ModuleCut()).out
        if type(module).__name__ == "Attention" and module.heads == 1 and cut is not None:
            factors[name] = math.sqrt(len(cut) / module.to_q.out_features)
    return factors


def module_shapes(model: nn.Module, cuts: Mapping[str, ModuleCut]) -> dict[str, dict[str, Any]]:
    """The configuration entry of the pruned class: module name -> shape."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, cut in cuts.items():
        module = model.get_submodule(name)
        if isinstance(module, NORMS):
            assert cut.out is not None
            sizes = torch.bincount(group_labels(module)[cut.out])
            shapes[name] = {"groups": [size for size in sizes.tolist() if size]}
            continue
        if isinstance(module, nn.Embedding):
            assert cut.out is not None
            shapes[name] = {"out": len(cut.out)}
            continue
        out = dimension_size(model, name, "out") if cut.out is None else len(cut.out)
        into = dimension_size(model, name, "in") if cut.into is None else len(cut.into)
        shapes[name] = {"out": out, "in": into}
        parent, _, leaf = name.rpartition(".")
        if leaf == "to_q" and cut.out is not None:
            attention: Any = model.get_submodule(parent)
            head = attention.to_q.out_features // attention.heads
            shapes[parent] = {"heads": 1 if attention.heads == 1 else out // head}
    return shapes


def remove(model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Kept) -> nn.Module:
    """The adaptive result: a `Pruned<class>` with every module at its own width.

    Exact: its outputs are those of the masked network, up to rounding.
    """
    from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import pruned_class

    cuts, depth = cuts_of(model, groups, kept), depth_of(model, groups, kept)
    config = {**stock_config(model), **depth.config}
    earlier = (config.get("gfprune") or {}).get("modules", {})
    modules = depth.renamed({**earlier, **module_shapes(model, cuts)})
    modules |= {name: {"identity": True} for name in depth.skipped}
    state = depth.renamed(slice_state(model, cuts))
    if not modules:
        return rebuild(type(model), config, state)  # only blocks went, and the stock class can say so
    config["gfprune"] = {"format": 1, "modules": modules}
    return rebuild(pruned_class(stock_name(type(model).__name__)), config, state)


def remove_native(
    model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Kept, config: Mapping[str, Any]
) -> nn.Module:
    """The native result: the stock class at the widths of `config`.

    Not exact where a norm's groups straddle the seam of a skip connection: the gap is measured by the caller.
    """
    cuts = cuts_of(model, groups, kept)
    return rebuild(type(model), {**stock_config(model), **config}, slice_state(model, cuts))


def stock_config(model: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(model.config).items() if not key.startswith("_")}


def rebuild(cls: Any, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
