"""By how many channels a group may narrow at once, and how far."""

import math

from gfprune_cli.structure.groups import ChannelGroup

HEAD_ALIGN = 8


def width_step(group: ChannelGroup, align: int) -> int:
    """Channels that lie between two widths: whole cells, and a multiple of `align` in a group twice as wide.

    Elsewhere of half of it, a quarter, ...: kernels that work in blocks waste less on a width that is nearly
    aligned. A head that narrows keeps a multiple of 8, which attention kernels ask for, unless `align` is 1.
    """
    if align > 1 and narrows_a_head(group):
        align = math.lcm(align, HEAD_ALIGN)
    while align > 1:
        aligned = math.lcm(group.step, align)
        if group.channels >= 2 * aligned and (group.channels % aligned == 0 or not narrows_a_head(group)):
            return aligned
        align //= 2
    return group.step


def step_down(group: ChannelGroup, kept: int, align: int) -> int:
    """Channels that the next step takes: from a width that is not aligned down to the next one that is."""
    step = width_step(group, align)
    return kept % step or step


def narrows_a_head(group: ChannelGroup) -> bool:
    """Whether the units are the channels of one attention head."""
    return group.unit_size == 1 and any(member.module.endswith("to_q") for member in group.producers)


def minimum_width(group: ChannelGroup, ratio: float, align: int) -> int:
    """The floor of a group: at least one step, and at least `ratio` of its channels; none for a block."""
    step = width_step(group, align)
    return 0 if group.is_block else max(step, step * math.ceil(group.channels * ratio / step))
