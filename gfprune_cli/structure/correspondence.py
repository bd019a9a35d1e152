"""What removal did to names and indices, for the record and for adapters of the dense network."""

from collections.abc import Mapping
from typing import Any

import torch

from gfprune_cli.checkpoint.correspondence import Correspondence, Layer, Stays
from gfprune_cli.structure.blocks import depth_of
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.removal import attention_scales, cuts_of, dimension_size, part_of
from gfprune_cli.structure.trace import is_attention


def correspondence(
    model: Any, groups: tuple[ChannelGroup, ...], kept: Mapping[str, torch.Tensor]
) -> Correspondence:
    """From a dense network to what is left of it.

    Args:
        model: the dense network; on the meta device is enough.
        kept: group name -> bool [units].
    """
    cuts, depth = cuts_of(model, groups, kept), depth_of(model, groups, kept)
    scales = {f"{name}.to_q": factor for name, factor in attention_scales(model, cuts).items()}
    layers = {}
    for old, cut in cuts.items():
        new = depth.rename(old)
        if new is not None and not is_attention(part_of(model, old)):
            out, into = (
                None if stays is None else Stays(tuple(stays.tolist()), dimension_size(model, old, side))
                for side, stays in (("out", cut.out), ("in", cut.into))
            )
            layers[new] = Layer(old, out, into, scales.get(old, 1.0))
    moved = {new: old for old, new in depth.moved.items() if new is not None and new != old}
    gone = tuple(old for old, new in depth.moved.items() if new is None)
    config = {key: model.config.get(key) for key in depth.config}
    return Correspondence(moved, gone, layers, config)


def kept_units(
    groups: tuple[ChannelGroup, ...], channels: Mapping[str, list[int]]
) -> dict[str, torch.Tensor]:
    """Group name -> bool [units], from the channels that a record names."""
    alive = {}
    for group in groups:
        mask = torch.zeros(group.channels, dtype=torch.bool)
        mask[torch.tensor(channels[group.name], dtype=torch.long)] = True
        alive[group.name] = mask.view(group.units, group.unit_size).all(1)
    return alive
