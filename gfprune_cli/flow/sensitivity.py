"""How the loss rises when part of one group is masked, everything else as it is."""

import math
from collections.abc import Callable, Mapping

import torch

from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import Event, Progress
from gfprune_cli.structure.groups import ChannelGroup, select

WORST = 1e30  # stands for a loss that is not finite: JSON has no infinity


def least_units(group: ChannelGroup, share: float) -> int:
    """Steps of a group that a measurement masks: at least one, and all of a block."""
    steps = group.channels // group.step
    return steps if group.is_block else max(1, min(steps - 1, round(steps * share)))


def measured_rises(
    masked: MaskedModel,
    scores: Mapping[str, torch.Tensor],
    share: float,
    loss: Callable[[], float],
    progress: Progress,
) -> dict[str, float]:
    """Group name -> rise of the loss when `share` of its channels, or the block, is masked.

    The units with the lowest scores go, the same number in every cell; everything else stays as it is.

    Args:
        scores: group name -> [units].
        loss: of the network at its present masks.

    Raises:
        GfpruneError: the loss is not finite before anything is masked.
    """
    whole, groups = dict(masked.masks), masked.groups
    before = loss()
    if not math.isfinite(before):
        raise GfpruneError("the loss of the dense network is not finite: check the checkpoint and --data")
    rises = {}
    try:
        for number, group in enumerate(groups):
            progress(Event("probe", number, len(groups)))
            keep = group.channels - least_units(group, share) * group.step
            support = select(group, scores[group.name], keep)
            masked.set_masks(whole | {group.name: whole[group.name] * support})
            rise = loss() - before
            rises[group.name] = rise if math.isfinite(rise) else WORST
    finally:
        masked.set_masks(whole)  # a run that stops here saves them
    progress(Event("probe", len(groups), len(groups)))
    return rises
