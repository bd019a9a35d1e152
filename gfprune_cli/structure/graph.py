"""From a network to its channel groups, by tracing it once with Torch-Pruning's dependency graph.

groups, trace = discover(model)          # any device, the meta device included
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch_pruning
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.examples import example_inputs
from gfprune_cli.structure.groups import ChannelGroup, Kind, Member, Side
from gfprune_cli.structure.norms import group_labels, plain_stand_ins
from gfprune_cli.structure.trace import Trace, observe
from gfprune_cli.structure.transformer import discover_transformer, is_transformer

KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Conv2d, "conv"),
    (nn.Linear, "linear"),
    (nn.GroupNorm, "norm"),
    (nn.Embedding, "embedding"),
)
SMALLEST_CELL = 2  # a cell of one unit leaves nothing to choose


def discover(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, width: bool = False
) -> tuple[tuple[ChannelGroup, ...], Trace]:
    """Find the channel groups of a denoiser.

    Groups that touch what must keep its width are left out: the network's input and output, the
    sinusoidal or learned time features, and class labels that enter as vectors.

    Returns:
        (groups in the order in which the network runs them, the trace of the forward pass).

    Raises:
        GfpruneError: the network cannot be traced.
    """
    if is_transformer(model):
        return discover_transformer(model, inputs)
    with plain_stand_ins(model):
        found, trace = trace_groups(model)
    order = {name: index for index, name in enumerate(trace.positions)}
    protected = {
        name for module in fixed_layers(model) for name, other in model.named_modules() if module is other
    }
    groups = [group for group in found if group is not None and not touches(group, protected)]
    return tuple(sorted(groups, key=lambda group: order[group.name])), trace


def trace_groups(model: nn.Module) -> tuple[list[ChannelGroup | None], Trace]:
    """Every group that the dependency graph finds, and what the forward pass showed."""
    trace = Trace()
    hooks = list(observe(model, trace))
    required = [parameter.requires_grad for parameter in model.parameters()]
    graph = torch_pruning.DependencyGraph()
    try:
        model.requires_grad_(True)  # the graph is read off autograd's tape
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), traceable_resampling():
            graph.build_dependency(
                model,
                example_inputs=example_inputs(model),
                forward_fn=lambda network, inputs: network(**inputs, return_dict=False)[0],
                verbose=False,
            )
        groups = graph.get_all_groups(ignored_layers=fixed_layers(model))
        return [read_group(model, raw) for raw in groups], trace
    except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GfpruneError(f"cannot trace {type(model).__name__}: {line}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, require in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(require)


@contextmanager
def traceable_resampling() -> Iterator[None]:
    """Let FIR resampling keep its channel axis while tracing.

    diffusers folds channels into the batch to filter them one by one, and the dependency graph loses them
    in the fold. Only shapes and channel order matter to a trace, so nearest-neighbour resampling serves.
    """

    def resample(
        tensor: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        size = [(length * up + sum(pad) - kernel.shape[0]) // down + 1 for length in tensor.shape[-2:]]
        return nn.functional.interpolate(tensor, size=size)

    with (
        patch("diffusers.models.upsampling.upfirdn2d_native", resample),
        patch("diffusers.models.downsampling.upfirdn2d_native", resample),
    ):
        yield


def touches(group: ChannelGroup, protected: set[str]) -> bool:
    """Whether a group would change the output of a layer whose output is fixed."""
    return any(member.module in protected for member in group.producers)


def fixed_layers(model: Any) -> list[nn.Module]:
    """Layers whose output width belongs to the outside world."""
    layers: list[nn.Module] = [model.conv_out]
    for name, module in model.named_modules():
        if (
            name.endswith("skip_conv")
            and isinstance(module, nn.Conv2d)
            and module.out_channels == model.conv_out.out_channels
        ):
            layers.append(module)  # NCSN++ sums images at every resolution
    if isinstance(model.time_proj, nn.Module) and any(True for _ in model.time_proj.parameters()):
        layers.append(model.time_proj)
    if getattr(model.config, "class_embed_type", None) == "identity":
        layers.append(model.time_embedding.linear_2)
    return layers


def read_group(model: nn.Module, raw: Any) -> ChannelGroup | None:
    """Translate one Torch-Pruning group; None when nothing in it holds weights."""
    modules = {id(module): name for name, module in model.named_modules()}
    kinds: dict[tuple[str, Side], Kind] = {}
    pairs: dict[tuple[str, Side], set[tuple[int, int]]] = {}  # (position, index in the root layer)
    for item in raw:
        layer = item.dep.target.module
        kind = next((kind for cls, kind in KINDS if isinstance(layer, cls)), None)
        if kind is None or id(layer) not in modules:
            continue
        out = kind == "norm" or "out_channels" in item.dep.handler.__name__
        key: tuple[str, Side] = (modules[id(layer)], "out" if out else "in")
        kinds[key] = kind
        roots = item.root_idxs if item.root_idxs else item.idxs
        pairs.setdefault(key, set()).update(zip(item.idxs, roots, strict=True))
    if not pairs:
        return None
    halves = [
        scale_and_shift(model, name, entries) for (name, side), entries in pairs.items() if side == "out"
    ]
    channel_of_root = join_roots([*pairs.values(), *halves])
    members = []
    for (name, side), entries in pairs.items():
        ordered = sorted({(position, channel_of_root[root]) for position, root in entries})
        positions, channels = (torch.tensor(column) for column in zip(*ordered, strict=True))
        members.append(Member(name, side, kinds[name, side], positions, channels))
    count = 1 + max(channel_of_root.values())
    unit_size = head_size(model, members)
    cells = selection_cells(model, members, count, unit_size)
    return ChannelGroup(members[0].module, count, unit_size, cells, tuple(members))


def scale_and_shift(model: nn.Module, name: str, pairs: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """A projection that is split into scale and shift: its two halves belong to the same channels.

    The dependency graph follows only one half through the split.
    """
    parent, _, leaf = name.rpartition(".")
    block: Any = model.get_submodule(parent)
    if leaf != "time_emb_proj" or getattr(block, "time_embedding_norm", "") != "scale_shift":
        return set()
    half = block.time_emb_proj.out_features // 2
    return {(position % half, root) for position, root in pairs}


def join_roots(members: Iterable[set[tuple[int, int]]]) -> dict[int, int]:
    """Index in the root layer -> channel. Roots that meet at one position are one channel.

    A projection of scale and shift, twice as wide as the layer it modulates, makes two roots of a channel.
    """
    parent: dict[int, int] = {}

    def find(root: int) -> int:
        parent.setdefault(root, root)
        while parent[root] != root:
            root = parent[root]
        return root

    for pairs in members:
        first: dict[int, int] = {}
        for position, root in sorted(pairs):
            low, high = sorted((find(first.setdefault(position, root)), find(root)))
            parent[high] = low
    channels: dict[int, int] = {}
    return {root: channels.setdefault(find(root), len(channels)) for root in sorted(parent)}


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
        if member.kind != "norm":
            continue
        norm = model.get_submodule(member.module)
        assert isinstance(norm, nn.GroupNorm)
        whole = len(member.positions.unique()) == norm.num_channels
        (own if whole else shared).append(norm_partition(norm, member, channels))
    units = channels // unit_size
    for partitions in (own, shared):
        for labels in sorted(partitions, key=lambda labels: -int(labels.max())):
            sizes = torch.bincount(labels)
            if unit_size == 1 and len(sizes.unique()) == 1 and int(sizes[0]) >= SMALLEST_CELL:
                return torch.argsort(labels, stable=True).view(len(sizes), -1)
    return torch.arange(units).view(1, units)
