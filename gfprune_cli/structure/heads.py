"""Attention heads as channel groups.

A unit is one key/value head with the query heads that read it: its rows of every query, key and value
projection, and its columns of what reads the attention's result. Norms over one head's channels stay as
they are; norms across heads lose the channels of the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.structure.groups import ChannelGroup, Member
from gfprune_cli.structure.norms import feature_count, is_feature_norm
from gfprune_cli.structure.trace import is_attention

QUERY_LAYERS = ("to_q", "add_q_proj")
KEY_LAYERS = ("to_k", "to_v", "add_k_proj", "add_v_proj")
QUERY_NORMS = ("norm_q", "norm_added_q")
KEY_NORMS = ("norm_k", "norm_added_k")
INPUT_NORMS = ("group_norm", "spatial_norm", "norm_cross")  # they see what the projections read
OUTPUTS = ("to_out", "to_add_out")
POSITIONAL = "positional:"  # before the name of an argument that came without it
# shapes of the rotary embeddings that attention modules received: module -> argument -> shapes
Rotary = dict[str, dict[str, list[tuple[int, ...]]]]
KNOWN = {*QUERY_LAYERS, *KEY_LAYERS, *QUERY_NORMS, *KEY_NORMS, *INPUT_NORMS, *OUTPUTS}


@dataclass(frozen=True)
class Layout:
    """How an attention divides its channels: `heads` queries, `kv_heads` keys, `head` channels each."""

    heads: int
    kv_heads: int
    head: int

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    def query_channels(self) -> torch.Tensor:
        """[queries] the key channel of the unit that each query channel belongs to.

        Neighbouring query heads share one key head (`repeat_interleave`).
        """
        keys = torch.arange(self.keys).view(self.kv_heads, 1, self.head)
        return keys.expand(-1, self.heads // self.kv_heads, -1).flatten()

    def key_channels(self) -> torch.Tensor:
        return torch.arange(self.keys)


def head_groups(model: nn.Module, rotary: Rotary) -> Iterator[ChannelGroup]:
    """The groups of every attention whose heads can leave."""
    for name, module in model.named_modules():
        if is_attention(module):
            group = head_group(model, name, module, rotary)
            if group is not None:
                yield group


def head_group(model: nn.Module, name: str, attention: Any, rotary: Rotary) -> ChannelGroup | None:
    """The heads of one attention; None where there is one only, or where a rule does not fit."""
    layout = head_layout(attention)
    if layout is None or unknown_children(attention):
        return None
    norms = across_heads(name, attention, layout)
    readers = result_readers(model, name, attention, layout)
    turned = rotary_member(name, rotary.get(name, {}), layout)
    if norms is None or not readers or turned is None:
        return None
    members = [*projections(name, attention, layout), *norms, *readers, *turned]
    cells = torch.arange(layout.kv_heads).view(1, -1)
    return ChannelGroup(f"{name}.to_q", layout.keys, layout.head, cells, tuple(members))


def head_layout(attention: Any) -> Layout | None:
    """The division of an attention's channels; None when its projections do not agree on one."""
    heads, queries, keys = attention.heads, attention.to_q.out_features, attention.to_k.out_features
    if heads < 2 or queries % heads:
        return None
    head = queries // heads
    if getattr(attention, "head_dim", head) != head or keys % head or heads % (keys // head):
        return None
    widths = [(QUERY_LAYERS, queries), (KEY_LAYERS, keys)]
    for leaves, width in widths:
        for leaf in leaves:
            layer = getattr(attention, leaf, None)
            if layer is not None and getattr(layer, "out_features", None) != width:
                return None
    return Layout(heads, keys // head, head) if keys // head > 1 else None


def unknown_children(attention: nn.Module) -> bool:
    """Whether an attention has weights of which no rule says what they do to its heads."""
    own = any(True for _ in attention.parameters(recurse=False))
    return own or any(
        leaf not in KNOWN and any(True for _ in child.parameters())
        for leaf, child in attention.named_children()
    )


def projections(name: str, attention: Any, layout: Layout) -> Iterator[Member]:
    for leaves, channels in ((QUERY_LAYERS, layout.query_channels()), (KEY_LAYERS, layout.key_channels())):
        for leaf in leaves:
            if getattr(attention, leaf, None) is not None:
                positions = torch.arange(len(channels))
                yield Member(f"{name}.{leaf}", "out", "linear", positions, channels)


def across_heads(name: str, attention: Any, layout: Layout) -> list[Member] | None:
    """Norms that run over all heads at once; None when a norm is of neither sort."""
    members = []
    for leaves, channels in ((QUERY_NORMS, layout.query_channels()), (KEY_NORMS, layout.key_channels())):
        for leaf in leaves:
            norm = getattr(attention, leaf, None)
            if norm is None or isinstance(norm, nn.Identity):
                continue
            if not is_feature_norm(norm):
                return None
            if feature_count(norm) == len(channels):
                members.append(Member(f"{name}.{leaf}", "out", "norm", torch.arange(len(channels)), channels))
            elif feature_count(norm) != layout.head:
                return None
    return members


def result_readers(model: nn.Module, name: str, attention: Any, layout: Layout) -> list[Member]:
    """The layers that read the attention's result, [..., queries] by head; empty when they are unknown."""
    channels = layout.query_channels()
    outputs = []
    for leaf in OUTPUTS:
        layer = getattr(attention, leaf, None)
        if isinstance(layer, nn.ModuleList | nn.Sequential) and len(layer):
            layer, leaf = layer[0], f"{leaf}.0"
        if isinstance(layer, nn.Linear):
            outputs.append((f"{name}.{leaf}", layer))
    if not getattr(attention, "to_out", None):
        outputs += parallel_output(model, name, layout)
        if not outputs:
            return []
    if any(layer.in_features < layout.queries for _, layer in outputs):
        return []
    return [Member(path, "in", "linear", torch.arange(len(channels)), channels) for path, _ in outputs]


def parallel_output(model: nn.Module, name: str, layout: Layout) -> list[tuple[str, nn.Linear]]:
    """The projection of a single-stream block: it reads concat(attention, feed-forward)."""
    parent = name.rpartition(".")[0]
    block: Any = model.get_submodule(parent)
    before, after = getattr(block, "proj_mlp", None), getattr(block, "proj_out", None)
    if not isinstance(before, nn.Linear) or not isinstance(after, nn.Linear):
        return []
    if after.in_features != layout.queries + before.out_features:
        return []
    return [(f"{parent}.proj_out", after)]


def rotary_member(name: str, shapes: dict[str, list[tuple[int, ...]]], layout: Layout) -> list[Member] | None:
    """Rotary embeddings of all heads at once are read as the heads are: those that stay keep their angles.

    Angles within one head are the same for every head, and need nothing. None for any other sort.
    """
    whole = False
    for key, shape in ((key, shape) for key, given in shapes.items() for shape in given if shape):
        # the pruned class selects angles among the keyword arguments of an attention
        if shape[-1] == layout.queries and "rotary" in key and not key.startswith(POSITIONAL):
            whole = True
        elif shape[-1] > layout.head or (len(shape) == 4 and layout.heads in shape[1:3]):
            return None
    if not whole:
        return []
    if layout.heads != layout.kv_heads:
        return None
    channels = layout.query_channels()
    return [Member(name, "in", "rotary", torch.arange(len(channels)), channels)]
