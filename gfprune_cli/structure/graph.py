"""From a network to its channel groups, by tracing it once with Torch-Pruning's dependency graph.

groups, trace = discover(model)          # any device, the meta device included
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import nn

from gfprune_cli.checkpoint.files import first_line, quoted
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure.groups import ChannelGroup, Kind, Member, Side
from gfprune_cli.structure.norms import group_labels, plain_stand_ins
from gfprune_cli.structure.removal import dimension_size
from gfprune_cli.structure.trace import CONVOLUTIONS, Trace, is_depthwise
from gfprune_cli.structure.tracing import dependency_graph, whole_groups
from gfprune_cli.structure.transformer import discover_transformer, is_transformer

NORMALISERS = (nn.LayerNorm, nn.GroupNorm)  # what leaves shifts their statistics, weights or not
KINDS: tuple[tuple[tuple[type[nn.Module], ...], Kind], ...] = (
    (CONVOLUTIONS, "conv"),
    ((nn.Linear,), "linear"),
    (NORMALISERS, "norm"),
    ((nn.Embedding,), "embedding"),
)
UNRULED = ("UNet", "UVit2DModel")  # stacks of transformer blocks among other ones
# what splits channels by heads or tokens that are numbers of its own
COUNTED = ("AttentionPooling", "ImageProjection", "TextImageProjection")
COUNTING_NORM = "AdaGroupNorm"  # a group norm within a function, of which no mask can change the statistics
SMALLEST_CELL = 2  # a cell of one unit leaves nothing to choose


def discover(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, width: bool = False, stages: bool = False
) -> tuple[tuple[ChannelGroup, ...], Trace]:
    """Find the channel groups of a denoiser or autoencoder.

    Groups that touch what must keep its width are left out: the network's input and output, latents, the
    sinusoidal or learned time features, class labels that enter as vectors. So are groups with a member whose
    removal is not known to be exact, such as a parameter of its own or a grouped convolution.

    Args:
        inputs: keyword arguments of one forward pass; None takes zeros that the configuration describes.
        width: also groups under a layer norm, whose residual streams otherwise keep their width.
        stages: of a U-Net, whole stages narrow, and with them what must be as wide as its stage.

    Returns:
        (groups in the order in which the network runs them, the trace of the forward pass).

    Raises:
        GfpruneError: the network cannot be traced, or nothing in it can be removed: a module is named.
    """
    if is_transformer(model) and not type(model).__name__.endswith(UNRULED):
        ruled = discover_transformer(model, inputs, width=width)
        if ruled[0]:
            return ruled
    if inputs is None:
        inputs = example_inputs(model)
    with plain_stand_ins(model):
        found, trace = trace_groups(model, inputs, width=width, stages=stages)
    order = {whole_layer(model, name): index for index, name in enumerate(trace.positions)}
    return tuple(sorted(found, key=lambda group: order[group.name])), trace


def trace_groups(
    model: nn.Module, inputs: Mapping[str, Any], *, width: bool, stages: bool
) -> tuple[list[ChannelGroup], Trace]:
    """Every group of the dependency graph that can be removed, and what the forward pass showed."""
    trace = Trace()
    graph = dependency_graph(model, inputs, trace)
    fixed = fixed_layers(model) + ([] if stages else tied_layers(model))
    names = {id(module): name for name, module in model.named_modules()}
    protected = {names[id(layer)] for layer in fixed}  # no group may change what these put out
    try:
        with whole_groups():
            read = [read_group(model, raw, names, width=width) for raw in graph.get_all_groups(fixed)]
    except ArithmeticError as error:  # the library's own, where a network splits channels in its own way
        name = type(model).__name__
        raise GfpruneError(f"the channels of {name} cannot be told apart: {first_line(error)}") from error
    found = [
        group
        for group in read
        if isinstance(group, ChannelGroup)
        and protected.isdisjoint(member.module for member in group.producers)
    ]
    blockers = [group for group in read if isinstance(group, str)]
    if not found and blockers:
        raise GfpruneError(
            f"no channel of {type(model).__name__} can be removed exactly: "
            f"{quoted(blockers[0])} stands in the way"
        )
    return found, trace


def is_joined_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of Kandinsky's and DeepFloyd's U-Nets."""
    return type(getattr(module, "processor", None)).__name__.startswith("AttnAddedKV")


def fixed_layers(model: Any) -> list[nn.Module]:
    """Layers whose output width belongs to the outside world, beside those that reach the output; and first
    factors, whose rank followed from a tolerance."""
    names = ["quant_conv", "post_quant_conv", "encoder.conv_out", "quantize.embedding"]
    if any(True for _ in getattr(model, "time_proj", nn.Identity()).parameters()):
        names.append("time_proj")
    if getattr(model.config, "class_embed_type", None) == "identity":
        names.append("time_embedding.linear_2")
    layers: list[Any] = [module for name, module in model.named_modules() if name in names]
    counted = (module for module in model.modules() if type(module).__name__ in COUNTED)
    layers += [layer for module in counted for layer in module.children()]
    layers = [layer[-1] if isinstance(layer, FactoredLinear) else layer for layer in layers]
    # a picture's features, which are joined to the noisy sample
    layers += [
        module.input_hint_block[-1] for module in model.modules() if hasattr(module, "input_hint_block")
    ]
    ranks = [module[0] for module in model.modules() if isinstance(module, FactoredLinear)]
    return [layer for layer in layers + ranks if any(True for _ in layer.parameters())]


def tied_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that must be as wide as the stream beside them, which no group says: the processor of this
    attention takes the width of the stream for that of its heads."""
    joined: Iterator[Any] = (module for module in model.modules() if is_joined_attention(module))
    return [layer for module in joined for layer in (module.to_q, module.add_k_proj, module.to_out[0])]


def read_group(
    model: nn.Module, raw: Any, names: Mapping[int, str], *, width: bool
) -> ChannelGroup | str | None:
    """Translate one Torch-Pruning group.

    Returns:
        The group; the name of a module or parameter that keeps it from being removed exactly; None when it
        reaches the output.
    """
    kinds: dict[tuple[str, Side], Kind] = {}
    parts: dict[tuple[str, Side], list[np.ndarray]] = {}
    for item in raw:
        layer = item.dep.target.module
        if isinstance(layer, torch_pruning.ops._OutputOp):
            return None
        if isinstance(layer, nn.Parameter):
            return next((name for name, parameter in model.named_parameters() if parameter is layer), "?")
        if id(layer) not in names:
            continue  # an operation without weights
        name, kind = names[id(layer)], removable_kind(layer, width=width)
        parent = name.rpartition(".")[0]
        if type(model.get_submodule(parent)).__name__ == COUNTING_NORM:
            return parent
        if name.endswith(".norm_cross"):  # attention asks for one of torch's own norms there
            return name
        if kind is None and (isinstance(layer, NORMALISERS) or any(True for _ in layer.parameters())):
            return name
        if kind is None:
            continue
        out = kind == "norm" or "out_channels" in item.dep.handler.__name__
        key: tuple[str, Side] = (name, "out" if out else "in")
        kinds[key] = kind
        roots = item.root_idxs if item.root_idxs else item.idxs
        parts.setdefault(key, []).append(np.array([item.idxs, roots]))
    pairs = {key: distinct(np.concatenate(found, axis=1)) for key, found in parts.items()}
    roots, channel_of_root = join_roots(list(pairs.values()))
    members = []
    for (name, side), (positions, own) in pairs.items():
        channels = channel_of_root[np.searchsorted(roots, own)]
        placed = distinct(np.stack([positions, channels]))
        members.append(Member(name, side, kinds[name, side], *torch.from_numpy(placed)))
    count = int(channel_of_root.max()) + 1
    for member in members:
        uneven = len(set(torch.bincount(member.channels, minlength=count).tolist())) > 1
        if uneven or int(member.positions.max()) >= dimension_size(model, member.module, member.side):
            return member.module  # it sees some channels only, or other things than channels
    unit_size = head_size(model, members)
    cells = selection_cells(model, members, count, unit_size)
    return ChannelGroup(whole_layer(model, members[0].module), count, unit_size, cells, tuple(members))


def whole_layer(model: nn.Module, name: str) -> str:
    """The name of a layer; that of the layer in whose place two factors stand, for one of them."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), FactoredLinear) else name


def distinct(pairs: np.ndarray) -> np.ndarray:
    """[2, n] the different pairs, in ascending order."""
    base = int(pairs[1].max()) + 1
    return np.stack(np.divmod(np.unique(pairs[0] * base + pairs[1]), base))


def removable_kind(layer: nn.Module, *, width: bool) -> Kind | None:
    """The kind of a layer whose channels can be removed one by one."""
    if isinstance(layer, nn.GroupNorm) and not layer.affine:
        return None
    if isinstance(layer, nn.LayerNorm) and (not width or len(layer.normalized_shape) > 1):
        return None
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and not is_depthwise(layer):
        return None
    return next((kind for classes, kind in KINDS if isinstance(layer, classes)), None)


def join_roots(members: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Roots that meet at one position of a member are one channel.

    A projection of scale and shift, twice as wide as the layer it modulates, makes two roots of a channel,
    and so do the two halves of a gated projection.

    Args:
        members: [2, n] each, positions and indices in the root layer.

    Returns:
        (sorted roots, the channel of each, numbered in that order).
    """
    roots = np.unique(np.concatenate([own for _, own in members]))
    label = np.arange(len(roots))
    meeting = [
        (positions, np.searchsorted(roots, own))
        for positions, own in members
        if len(np.unique(positions)) < len(positions)
    ]
    changed = True
    while changed:
        changed = False
        for positions, own in meeting:
            lowest = np.full(positions.max() + 1, len(roots))
            np.minimum.at(lowest, positions, label[own])
            lower = label.copy()
            np.minimum.at(lower, own, lowest[positions])
            changed |= bool((lower != label).any())
            label = lower
    return roots, np.unique(label, return_inverse=True)[1]


def head_size(model: nn.Module, members: Sequence[Member]) -> int:
    """Channels per unit: the head dimension where several heads share one projection, else 1."""
    for member in members:
        parent, _, leaf = member.module.rpartition(".")
        if leaf == "to_q" and member.side == "out":
            attention: Any = model.get_submodule(parent)
            return attention.to_q.out_features // attention.heads if attention.heads > 1 else 1
    return 1


def norm_partition(norm: nn.GroupNorm, member: Member, channels: int) -> torch.Tensor:
    """[channels] label of the norm groups that a channel is in (all of its positions taken together)."""
    group_of_position = group_labels(norm)[member.positions]
    seen: list[list[int]] = [[] for _ in range(channels)]
    for channel, group in zip(member.channels.tolist(), group_of_position.tolist(), strict=True):
        seen[channel].append(group)
    labels = {groups: index for index, groups in enumerate(sorted({tuple(groups) for groups in seen}))}
    return torch.tensor([labels[tuple(groups)] for groups in seen])


def selection_cells(
    model: nn.Module, members: Sequence[Member], channels: int, unit_size: int
) -> torch.Tensor:
    """The finest partition of the units that a norm imposes and that leaves something to choose.

    Norms that see this group alone come first: with equal counts in their groups they stay plain
    `nn.GroupNorm`. Coarser nested partitions follow for free; a partition that cannot be honoured
    becomes an uneven norm at removal, which is exact too.
    """
    own: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    for member in members:
        norm = model.get_submodule(member.module)
        if not isinstance(norm, nn.GroupNorm):
            continue
        whole = len(member.positions.unique()) == norm.num_channels
        (own if whole else shared).append(norm_partition(norm, member, channels))
    units = channels // unit_size
    for partitions in (own, shared):
        for labels in sorted(partitions, key=lambda labels: -int(labels.max())):
            sizes = torch.bincount(labels)
            if unit_size == 1 and len(sizes.unique()) == 1 and int(sizes[0]) >= SMALLEST_CELL:
                return torch.argsort(labels, stable=True).view(len(sizes), -1)
    return torch.arange(units).view(1, units)
