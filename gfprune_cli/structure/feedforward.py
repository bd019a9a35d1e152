"""Feed-forward units as channel groups: rows of what produces a unit, its column of what reads it.

A gated unit has two rows, one in each half of a projection (GEGLU, SwiGLU), or one in each of two
projections. Zero rows make a zero unit, because every activation here maps zero to zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.structure.groups import ChannelGroup, Kind, Member
from gfprune_cli.structure.trace import CONVOLUTIONS

ACTIVATIONS = {"GELU", "GEGLU", "SwiGLU", "ApproximateGELU", "LinearActivation"}


@dataclass(frozen=True)
class Units:
    """Names of the layers, inside their block, that produce hidden units and the layer that reads them."""

    producers: tuple[str, ...]
    reader: str
    start: int = 0  # of the units among the reader's inputs


BLOCKS = {
    "GLUMBConv": Units(("conv_inverted", "conv_depth"), "conv_point"),
    "LuminaFeedForward": Units(("linear_1", "linear_3"), "linear_2"),
    "AuraFlowFeedForward": Units(("linear_1", "linear_2"), "out_projection"),
    "Flux2FeedForward": Units(("linear_in",), "linear_out"),
    "Flux3FeedForward": Units(("linear_in",), "linear_out"),
    "Kandinsky5FeedForward": Units(("in_layer",), "out_layer"),
    "OmniGenFeedForward": Units(("gate_up_proj",), "down_proj"),
    "QwenImage21SwiGLUFeedForward": Units(("gate_layer", "proj"), "out"),
    "StableAudio3FeedForward": Units(("proj_in",), "proj_out"),
    "SanaWMMlp": Units(("fc1",), "fc2"),
    "AudioDiTFeedForward": Units(("ff.0",), "ff.3"),
}
# gated units of many classes, by the names of their layers
GATED = (
    Units(("w1", "w3"), "w2"),
    Units(("gate", "up"), "down"),
    Units(("gate_proj", "up_proj"), "down_proj"),
    Units(("gate_proj", "up_proj"), "linear_fc2"),
)


def feedforward_groups(model: nn.Module) -> Iterator[ChannelGroup]:
    """The groups of every feed-forward block."""
    for name, module in model.named_modules():
        units = units_of(module)
        if units is not None:
            group = unit_group(name, module, units)
            if group is not None:
                yield group


def units_of(module: Any) -> Units | None:
    """Where the hidden units of a block are; None for a module that has none."""
    kind = type(module).__name__
    if (gated := gated_units(module)) is not None:
        return gated
    if kind == "FeedForward" and isinstance(getattr(module, "net", None), nn.ModuleList):
        return Units(("net.0.proj",), "net.2") if type(module.net[0]).__name__ in ACTIVATIONS else None
    if kind in BLOCKS:
        return BLOCKS[kind]
    before, after = getattr(module, "proj_mlp", None), getattr(module, "proj_out", None)
    if isinstance(before, nn.Linear) and isinstance(after, nn.Linear) and hasattr(module, "act_mlp"):
        # a single-stream block: the projection reads concat(attention, feed-forward)
        return Units(("proj_mlp",), "proj_out", after.in_features - before.out_features)
    return None


def gated_units(module: Any) -> Units | None:
    """Where the units of a block of three linear layers are, two of which make a unit and its gate."""
    layers = {leaf for leaf, child in module.named_children() if any(True for _ in child.parameters())}
    for units in GATED:
        names = {*units.producers, units.reader}
        if layers == names and all(isinstance(getattr(module, leaf), nn.Linear) for leaf in names):
            return units
    return None


def unit_group(name: str, block: nn.Module, units: Units) -> ChannelGroup | None:
    """The group of one block's hidden units; None when its layers do not agree on their number."""
    reader: Any = block.get_submodule(units.reader)
    count = reader.weight.shape[1] - units.start
    members = []
    for leaf in units.producers:
        layer: Any = block.get_submodule(leaf)
        width = len(layer.weight)
        if count < 2 or width % count or width // count > 2:
            return None
        positions = torch.arange(width)
        members.append(Member(f"{name}.{leaf}", "out", kind_of(layer), positions, positions % count))
    channels = torch.arange(count)
    path = f"{name}.{units.reader}"
    members.append(Member(path, "in", kind_of(reader), channels + units.start, channels))
    return ChannelGroup(members[0].module, count, 1, channels.view(1, -1), tuple(members))


def kind_of(layer: nn.Module) -> Kind:
    return "conv" if isinstance(layer, CONVOLUTIONS) else "linear"
