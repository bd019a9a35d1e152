"""What makes groups comparable: the loss that is measured when part of one group is masked.

Scores rank the units of one group well. Added up they say little about what a group can spare: first-order
terms nearly vanish in a trained network, and what they leave out, curvature and the joint effect of many
units, differs much from layer to layer. So the weaker half of every group is masked once, alone, and the
scores of the group are scaled to what that does to the loss.
"""

import math
from collections.abc import Callable, Mapping

import torch

from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.progress import Event, Report
from gfprune_cli.structure.groups import ChannelGroup, select

SHARE = 0.5  # of a group's channels, masked to compare it with the others
DRAWS = 8  # noisy samples behind each measurement, at most as many as a scoring takes
WORST = 1e30  # stands for a loss that is not finite: JSON has no infinity
POWER = 2  # of the share of the scores that is gone: errors of one layer add up in phase
NOISE = 0.01  # of the mean rise: what is smaller cannot be told from nothing


def spared(group: ChannelGroup, share: float) -> int:
    """Steps of a group that a measurement masks: at least one, and all of a block."""
    steps = group.channels // group.step
    return steps if group.stack else max(1, min(steps - 1, round(steps * share)))


def measured_rises(
    masked: MaskedModel,
    scores: Mapping[str, torch.Tensor],
    share: float,
    loss: Callable[[], float],
    report: Report,
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
            report(Event("probe", number, len(groups)))
            keep = group.channels - spared(group, share) * group.step
            support = select(group, scores[group.name], keep)
            masked.set_masks(whole | {group.name: whole[group.name] * support})
            rise = loss() - before
            rises[group.name] = rise if math.isfinite(rise) else WORST
    finally:
        masked.set_masks(whole)  # a run that stops here saves them
    report(Event("probe", len(groups), len(groups)))
    return rises


def comparable(
    groups: tuple[ChannelGroup, ...], scores: Mapping[str, torch.Tensor], rises: Mapping[str, float]
) -> Masks:
    """Scores in units of the loss: what each unit adds to its group's loss when it goes in its turn.

    A group whose units with the lowest scores are gone is taken to raise the loss by

        rise * (C(gone) / C(masked when it was measured)) ** POWER,   C(n) = the sum of its n lowest scores;

    where scores are negative, or none of those masked has one, C counts units.

    Args:
        scores: group name -> [units].
        rises: what `measured_rises` found at `SHARE`, for these groups.

    Returns:
        group name -> [units] float64; within a group the order of the units is that of the scores.
    """
    known = [max(rise, 0.0) for rise in rises.values() if rise < WORST]
    if not sum(known):
        return {name: values.double().cpu() for name, values in scores.items()}
    least, most = NOISE * sum(known) / len(known), max(known)
    found = {}
    for group in groups:
        ranked, sums = curve(group, scores[group.name])
        levels = min(max(rises[group.name], least), most) * sums**POWER
        values = torch.empty(group.units, dtype=torch.float64)
        values[ranked] = torch.diff(levels, prepend=levels.new_zeros(1)) / len(group.cells)
        found[group.name] = values
    return found


def curve(group: ChannelGroup, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a group has lost after each step, 1 where it was measured.

    Returns:
        units of each cell, weakest first [cells, steps]; C [steps].
    """
    values, order = scores.double().cpu()[group.cells].sort(dim=1, stable=True)
    steps = values.sum(0)
    measured = spared(group, SHARE)
    if bool((steps < 0).any()) or not float(steps[:measured].sum()) > 0:
        steps = torch.ones_like(steps)
    sums = steps.cumsum(0)
    return group.cells.gather(1, order), sums / sums[measured - 1]
