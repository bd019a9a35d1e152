"""Blocks in which one projection makes queries, keys, values and feed-forward units, and one reads them all.

[queries | keys | values | units (twice, if gated)] -> attention and activation -> [attention | units].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gfprune_cli.structure.groups import ChannelGroup, Member
from gfprune_cli.structure.heads import Layout, Rotary, across_heads, rotary_member
from gfprune_cli.structure.trace import FUSED, is_fused

KNOWN = {FUSED, "to_out", "norm_q", "norm_k"}


def fused_groups(model: nn.Module, rotary: Rotary) -> Iterator[ChannelGroup]:
    """Heads and feed-forward units of every fused block; none of one to which the rule does not fit."""
    for name, module in model.named_modules():
        if is_fused(module):
            yield from groups_of_block(name, module, rotary)


def groups_of_block(name: str, block: Any, rotary: Rotary) -> Iterator[ChannelGroup]:
    inner, units, gates = block.inner_dim, block.mlp_hidden_dim, block.mlp_mult_factor
    unknown = any(
        leaf not in KNOWN and any(True for _ in child.parameters()) for leaf, child in block.named_children()
    )
    fits = (
        inner % block.heads == 0
        and getattr(block, FUSED).out_features == 3 * inner + gates * units
        and block.to_out.in_features == inner + units
    )
    layout = Layout(block.heads, block.heads, inner // block.heads)
    plain = across_heads(name, block, layout) == [] == rotary_member(name, rotary.get(name, {}), layout)
    if unknown or not fits or not plain:
        return
    if block.heads > 1:
        heads = torch.arange(block.heads).view(1, -1)
        members = halves(name, inner, 3, 0, 0)
        yield ChannelGroup(f"{name}.{FUSED}", inner, layout.head, heads, members)
    members = halves(name, units, gates, 3 * inner, inner)
    yield ChannelGroup(f"{name}.mlp_act_fn", units, 1, torch.arange(units).view(1, -1), members)


def halves(name: str, count: int, times: int, written: int, read: int) -> tuple[Member, ...]:
    """Channels that the projection writes `times` in a row from `written` on, and that are read at `read`."""
    positions, channels = torch.arange(count * times), torch.arange(count)
    return (
        Member(f"{name}.{FUSED}", "out", "linear", positions + written, positions % count),
        Member(f"{name}.to_out", "in", "linear", channels + read, channels),
    )
