"""Widths that the stock diffusers class can express, so that the result loads with no flag.

The first stage keeps its width: `Timesteps(block_out_channels[0])` derives the sinusoidal features from it.
Where a stage attends to text (`UNet2DConditionModel`), whole heads leave with its channels: its transformer
blocks are as wide as the stage, and a head keeps its dimension.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.structure.cost import CostModel, counted
from gfprune_cli.structure.graph import is_joined_attention
from gfprune_cli.structure.groups import ChannelGroup, select
from gfprune_cli.structure.removal import cuts_of, empty, slice_state
from gfprune_cli.structure.search import Allocation
from gfprune_cli.structure.trace import is_attention

RATIOS = 32  # candidate width ratios between 0 and 1; at each, every stage rounds down or up
TEXT_TO_IMAGE = "UNet2DConditionModel"
FEED_FORWARD = "ffn_dim"  # a key of Wan and its kin: the hidden width of every block
FEED_FORWARD_LAYER = re.compile(r"^blocks\.\d+\.ffn\.")
KERNEL = 64  # channels that such widths are multiples of, where the dense one is


def narrows_streams(class_name: str, layout: str) -> bool:
    """Whether the streams of transformer blocks inside a U-Net narrow without being asked to."""
    return layout == "native" and class_name == TEXT_TO_IMAGE


@dataclass(frozen=True)
class Stage:
    """One entry of `block_out_channels`: its width, its heads (0: none is counted), and what they come in."""

    width: int
    heads: int
    step: int


def native_allocation(
    model: Any, cost: CostModel, sparsity: float, budget: str
) -> tuple[Allocation, dict[str, Any]]:
    """The stock configuration nearest to the target.

    Returns:
        (channels kept by each group, the stock configuration that has them); those of the dense network where
        the stock class can express no narrower one.
    """
    best = Allocation({name: group.channels for name, group in cost.groups.items()}, 0.0, {})
    found: dict[str, Any] = dict(model.config)
    stages = stages_of(model)
    ratios = (index / RATIOS for index in range(1, RATIOS + 1))
    candidates = itertools.chain.from_iterable(scaled_widths(stages, ratio) for ratio in ratios)
    for widths in dict.fromkeys(candidates):
        tried = ((config, kept_by_shapes(cost, model, config)) for config in narrower(model, stages, widths))
        config, kept = next(((config, kept) for config, kept in tried if kept is not None), ({}, None))
        if kept is None:
            continue
        reached = allocation_of(cost, kept, budget)
        if not best.sparsities or abs(reached.sparsity - sparsity) < abs(best.sparsity - sparsity):
            best, found = reached, config
    return best, found


def allocation_of(cost: CostModel, kept: Mapping[str, int], budget: str) -> Allocation:
    shares = cost.gone(kept, counted(budget))
    return Allocation(kept, min(shares.values()), shares)


def feed_forward_groups(model: Any, groups: tuple[ChannelGroup, ...]) -> tuple[ChannelGroup, ...]:
    """The hidden units of feed-forward layers that one key of the configuration counts, of all blocks; none
    where there is no such key."""
    width = model.config.get(FEED_FORWARD)
    found = tuple(group for group in groups if FEED_FORWARD_LAYER.search(group.name))
    return found if found and all(group.channels == width for group in found) else ()


def feed_forward_allocation(
    cost: CostModel, sparsity: float, budget: str
) -> tuple[Allocation, dict[str, int]]:
    """One width for the feed-forward layers of all blocks, nearest to the target.

    Args:
        cost: of a network whose groups are `feed_forward_groups`.

    Returns:
        (channels kept by each group, the key of the stock configuration).

    Raises:
        UsageError: there is no narrower one.
    """
    width = next(iter(cost.groups.values())).channels
    step = math.gcd(width, KERNEL)
    narrower = range(step, width, step)
    if not narrower:
        raise UsageError(
            f"--layout native: feed-forward layers of {width} cannot shrink by steps of {step}: use adaptive"
        )
    reached = [allocation_of(cost, dict.fromkeys(cost.groups, kept), budget) for kept in narrower]
    found = min(reached, key=lambda one: abs(one.sparsity - sparsity))
    return found, {FEED_FORWARD: next(iter(found.kept.values()))}


def stages_of(model: Any) -> list[Stage]:
    """The stages of a U-Net, with the steps in which each may narrow: whole norm groups, and whole heads."""
    config = model.config
    groups = config["norm_num_groups"] or 4  # NCSN++ derives its groups: a quarter of the channels
    widths = config["block_out_channels"]
    heads, attending = [0] * len(widths), set()
    if type(model).__name__ == TEXT_TO_IMAGE:
        given = config["attention_head_dim"]  # in this class the number of heads
        heads = [given] * len(widths) if isinstance(given, int) else list(given)
        parts: dict[str, Any] = {name: part for name, part in model.named_modules() if is_attention(part)}
        attending = {stage_of(name, len(widths)) for name in parts}
        for name, module in parts.items():
            if is_joined_attention(module):  # its blocks take that key for the dimension of a head
                heads[stage_of(name, len(widths))] = module.heads
    stages = []
    for number, (width, count) in enumerate(zip(widths, heads, strict=True)):
        whole = count and number in attending and width % count == 0
        stages.append(Stage(width, count, math.lcm(groups, width // count) if whole else groups))
    return stages


def stage_of(module: str, stages: int) -> int:
    """The stage in which a module lies, -1 for none; the middle block is as wide as the last one."""
    part, _, rest = module.partition(".")
    if part not in ("down_blocks", "up_blocks"):
        return stages - 1 if part == "mid_block" else -1
    number = int(rest.partition(".")[0])
    return stages - 1 - number if part == "up_blocks" else number


def scaled_widths(stages: list[Stage], ratio: float) -> Iterator[tuple[int, ...]]:
    """Stage widths near one ratio, in the steps of each; the first stage stays."""
    first, *others = stages
    choices = [
        {
            min(stage.width, max(stage.step, stage.step * rounded(stage.width * ratio / stage.step)))
            for rounded in (math.floor, math.ceil)
        }
        for stage in others
    ]
    for widths in itertools.product(*(sorted(choice) for choice in choices)):
        yield (first.width, *widths)


def narrower(model: Any, stages: list[Stage], widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Stock configurations of these widths: with fewer heads, and with the key of the heads as it is.

    Blocks of another kind in the same class read that key as the dimension of a head.
    """
    config = {**model.config, "block_out_channels": widths}
    if any(stage.heads for stage in stages):
        pairs = zip(stages, widths, strict=True)
        heads = [max(1, width * stage.heads // stage.width) for stage, width in pairs]
        yield {**config, "attention_head_dim": tuple(heads)}
    yield config


def kept_by_shapes(cost: CostModel, model: Any, config: Mapping[str, Any]) -> dict[str, int] | None:
    """Channels kept by each group in the stock network of a configuration; None if there is none."""
    try:
        target = empty(type(model), config)
    except (ValueError, ZeroDivisionError):
        return None
    if target.state_dict().keys() != model.state_dict().keys():
        return None  # a shortcut convolution appears or vanishes where stages become, or were, equally wide
    kept = {}
    for name, group in cost.groups.items():
        member = next(member for member in group.producers if member.kind != "norm")
        share = len(member.positions) // group.channels
        layer: Any = target.get_submodule(member.module)
        width = layer.weight.shape[1 if member.kind == "embedding" else 0]
        kept[name] = width // share
        if kept[name] % group.unit_size or not 0 < kept[name] <= group.channels:
            return None
    return kept if expresses(target, model, cost, kept) else None


def expresses(target: Any, model: Any, cost: CostModel, kept: Mapping[str, int]) -> bool:
    """Whether a stock network takes what is left of the dense one: every tensor, and heads as they are."""
    groups = tuple(cost.groups.values())
    alive = {group.name: select(group, torch.ones(group.units), kept[group.name]) for group in groups}
    left = slice_state(model, cuts_of(model, groups, alive))
    shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
    if any(left[name].shape != shape for name, shape in shapes.items()):
        return False
    dense: dict[str, Any] = dict(model.named_modules())
    return all(
        module.heads * dense[name].to_q.out_features == dense[name].heads * module.to_q.out_features
        for name, module in target.named_modules()
        if is_attention(module) and dense[name].heads > 1
    )
