"""Physical removal: the narrow network that computes what the masked one computes.

Weights are sliced by name and loaded into the class that the checkpoint will name, so what is measured
here is what users load.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.families.table import pairs
from gfprune_cli.structure.blocks import depth_of
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.norms import NORMS, feature_count, group_labels, is_feature_norm
from gfprune_cli.structure.trace import FUSED, is_attention, is_depthwise

Kept = Mapping[str, torch.Tensor]

REGISTERED = {"_parameters", "_buffers", "_modules"}  # attributes in which torch keeps what it knows of


@dataclass(frozen=True)
class ModuleCut:
    """Positions of one module that stay, sorted; None where the dimension is whole.

    Those of a parameter of its own (named by its full name) are in its last dimension.
    """

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
    stays = {key: torch.nonzero(mask).flatten() for key, mask in alive.items()}
    return {name: ModuleCut(stays.get((name, "out")), stays.get((name, "in"))) for name, _ in stays}


def dimension_size(model: nn.Module, name: str, side: str) -> int:
    """Size of one dimension of a module, or the last one of a parameter."""
    found: Any = part_of(model, name)
    if isinstance(found, torch.Tensor):
        return found.shape[-1]
    if isinstance(found, NORMS):
        return found.num_channels
    if is_feature_norm(found):
        return feature_count(found)
    if is_attention(found):
        return int(found.to_q.out_features)
    if isinstance(found, nn.Embedding):
        return found.embedding_dim
    weight: torch.Tensor = found.weight
    return weight.shape[0] if side == "out" else weight.shape[1]


def part_of(model: nn.Module, name: str) -> Any:
    """The module, parameter or buffer of a name."""
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def slice_state(
    model: nn.Module, cuts: Mapping[str, ModuleCut], *, spend: bool = False
) -> dict[str, torch.Tensor]:
    """The state dict that is left, as new contiguous tensors under the same names.

    Buffers that lose positions are in it even where the dense model computes them anew.

    Args:
        spend: let go of each parameter of the model once it is sliced.
    """
    computed = {name: buffer for name, buffer in model.named_buffers() if name in cuts}
    whole, state = {**model.state_dict(), **computed}, {}
    for key in list(whole):
        tensor = whole.pop(key)
        parent = key.rpartition(".")[0]
        own, cut = cuts.get(key, ModuleCut()), cuts.get(parent, ModuleCut())
        embedding = isinstance(model.get_submodule(parent), nn.Embedding)
        if own.out is not None:
            tensor = tensor.index_select(-1, own.out.to(tensor.device))
        if cut.out is not None:
            tensor = tensor.index_select(1 if embedding else 0, cut.out.to(tensor.device))
        if cut.into is not None and tensor.ndim > 1:
            tensor = tensor.index_select(1, cut.into.to(tensor.device))
        state[key] = tensor.clone(memory_format=torch.contiguous_format)
        if spend:
            empty_parameter(model, key)
    for name, factor in attention_scales(model, cuts).items():
        for key in (f"{name}.to_q.weight", f"{name}.to_q.bias"):
            if key in state:
                state[key] = state[key] * factor
    return state


def empty_parameter(model: nn.Module, name: str) -> None:
    """Leave a parameter its shape alone; buffers stay."""
    parent, _, leaf = name.rpartition(".")
    parameters = model.get_submodule(parent)._parameters
    parameter = parameters.get(leaf)
    if parameter is not None:
        parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


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
        module = part_of(model, name)
        if is_attention(module):
            shapes.setdefault(name, {}).update(rotary_shape(module, cut))
            continue
        shapes[name] = layer_shape(model, name, module, cut)
        parent, _, leaf = name.rpartition(".")
        if leaf == FUSED and cut.out is not None:
            shapes[parent] = fused_shape(model.get_submodule(parent), cut.out)
        if isinstance(module, torch.Tensor):
            shapes |= table_shape(parent, model.get_submodule(parent), cut)
        if leaf == "to_q" and cut.out is not None:
            shapes.setdefault(parent, {}).update(
                attention_shape(model.get_submodule(parent), len(cut.out), cuts.get(f"{parent}.to_k"))
            )
    return shapes


def layer_shape(model: nn.Module, name: str, layer: Any, cut: ModuleCut) -> dict[str, Any]:
    """The shape of a layer or parameter that is left."""
    out, into = (
        dimension_size(model, name, side) if stays is None else len(stays)
        for side, stays in (("out", cut.out), ("in", cut.into))
    )
    if isinstance(layer, torch.Tensor):
        return {"parameter": [*layer.shape[:-1], out]}
    if isinstance(layer, NORMS):
        assert cut.out is not None
        sizes = torch.bincount(group_labels(layer)[cut.out])
        return {"groups": [size for size in sizes.tolist() if size]}
    if is_feature_norm(layer):
        return {"norm": out}
    if isinstance(layer, nn.Embedding):
        return {"out": out}
    if is_depthwise(layer):
        return {"out": out, "in": out, "conv_groups": out}
    return {"out": out, "in": into}


def table_shape(name: str, owner: Any, cut: ModuleCut) -> dict[str, dict[str, Any]]:
    """For a patch embedding that computes its position table anew for other sizes: which channels are left,
    in the dense numbering."""
    computes = any(cls.__name__ == "PatchEmbed" for cls in type(owner).__mro__)
    if not computes or owner.pos_embed_max_size or cut.out is None:
        return {}
    width = owner.pos_embed.shape[-1]
    before = getattr(owner, "channels", None) or list(range(width))
    stays = [before[index] for index in cut.out.tolist()]
    return {name: {"channels": stays, "of": getattr(owner, "dense_width", width)}}


def attention_shape(attention: Any, queries: int, keys: ModuleCut | None) -> dict[str, Any]:
    """Heads that are left of an attention whose query projection keeps `queries` channels."""
    if attention.heads == 1:
        return {"heads": 1}
    head = attention.to_q.out_features // attention.heads
    shape = {"heads": queries // head}
    if keys is not None and keys.out is not None and len(keys.out) != queries:
        shape["kv_heads"] = len(keys.out) // head
    return shape


def fused_shape(block: Any, stays: torch.Tensor) -> dict[str, Any]:
    """Heads and units that are left of a block that makes them by one projection."""
    queries = int((stays < block.inner_dim).sum())
    units = int((stays >= 3 * block.inner_dim).sum()) // block.mlp_mult_factor
    head = block.inner_dim // block.heads
    return {"heads": queries // head, "attributes": {"inner_dim": queries, "mlp_hidden_dim": units}}


def rotary_shape(attention: Any, cut: ModuleCut) -> dict[str, Any]:
    """Which heads are left of an attention whose rotary angles differ by head, in the dense numbering."""
    head = attention.to_q.out_features // attention.heads
    before = getattr(attention, "rotary_heads", None) or list(range(attention.heads))
    assert cut.into is not None
    return {"rotary_heads": [before[index] for index in (cut.into[::head] // head).tolist()]}


def remove(model: Any, groups: tuple[ChannelGroup, ...], kept: Kept, *, spend: bool = False) -> nn.Module:
    """The adaptive result: a `Pruned<class>` with every module at its own width.

    Exact: its outputs are those of the masked network, up to rounding.

    Args:
        spend: let go of the model's weights on the way.
    """
    cuts, depth = cuts_of(model, groups, kept), depth_of(model, groups, kept)
    config = {**stock_config(model), **depth.config}
    earlier = config.get("gfprune") or {}
    modules = depth.renamed({**earlier.get("modules", {}), **module_shapes(model, cuts)})
    for name in depth.skipped:
        streams = pairs().get(type(model.get_submodule(name)).__name__)
        modules[name] = {"identity": list(streams) if streams else True}
    cls = type(model)  # where only blocks went, the stock class can say so
    if modules or not depth.config:
        config["gfprune"] = {"format": 1, "modules": modules}
        dense = {**{key: model.config[key] for key in depth.config}, **earlier.get("dense", {})}
        if dense:
            config["gfprune"]["dense"] = dense
        cls = pruned_class(stock_name(cls.__name__))
    return carry_over(model, rebuild(cls, config, depth.renamed(slice_state(model, cuts, spend=spend))))


def remove_native(
    model: nn.Module,
    groups: tuple[ChannelGroup, ...],
    kept: Kept,
    config: Mapping[str, Any],
    *,
    spend: bool = False,
) -> nn.Module:
    """The native result: the stock class at the widths of `config`.

    Not exact where a norm's groups straddle the seam of a skip connection: the gap is measured by the caller.
    """
    cuts = cuts_of(model, groups, kept)
    state = slice_state(model, cuts, spend=spend)
    native = rebuild(type(model), {**stock_config(model), **config}, state)
    return carry_over(model, native)


def stock_config(model: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(model.config).items() if not key.startswith("_")}


def rebuild(cls: Any, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A network of a class and a configuration, with these weights."""
    model = empty(cls, config)
    model.load_state_dict(state, assign=True)
    found: nn.Module = model.requires_grad_(False).eval()
    return found


def empty(cls: Any, config: Mapping[str, Any], within: AbstractContextManager[Any] | None = None) -> Any:
    """A network without weights, made in a context: by default all of it is on the meta device.

    Keys that the class does not know, of other versions or of training scripts, are ignored as diffusers
    ignores them when it loads, and stay in the configuration.
    """
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = cls._get_init_keys(cls)
    with within or torch.device("meta"):
        model = cls(**{key: value for key, value in given.items() if key in known})
    model.register_to_config(**{key: value for key, value in given.items() if key not in known})
    return model


def skeleton(model: nn.Module) -> Any:
    """A network of the same structure on the meta device, without weights."""
    return empty(type(model), stock_config(model)).eval()


def carry_over(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give a network built without weights what no state dict holds: tables that constructors compute."""
    origins = dict(source.named_modules())
    for name, module in target.named_modules():
        if name not in origins:
            continue
        plain = {leaf: value for leaf, value in vars(module).items() if leaf not in REGISTERED}
        for leaf, value in {**module._buffers, **plain}.items():
            origin = getattr(origins[name], leaf, None)
            if any(map(is_empty, tree_leaves(value))) and not any(map(is_empty, tree_leaves(origin))):
                setattr(module, leaf, origin)
    return target


def is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
