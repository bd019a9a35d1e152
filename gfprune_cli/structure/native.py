"""Widths that the stock diffusers class can express, so that the result loads with no flag.

The first stage keeps its width: `Timesteps(block_out_channels[0])` derives the sinusoidal features from it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gfprune_cli.structure.cost import CostModel, counted
from gfprune_cli.structure.removal import cuts_of, empty, slice_state
from gfprune_cli.structure.search import Allocation

RATIOS = 32  # candidate width ratios between 0 and 1; at each, every stage rounds down or up


def native_allocation(
    model: Any, cost: CostModel, sparsity: float, budget: str
) -> tuple[Allocation, dict[str, Any]]:
    """The stock configuration nearest to the target.

    Returns:
        (channels kept by each group, the stock configuration that has them).
    """
    config = dict(model.config)
    best: tuple[float, Allocation, dict[str, Any]] | None = None
    tried: set[tuple[int, ...]] = set()
    ratios = (index / RATIOS for index in range(1, RATIOS + 1))
    for widths in itertools.chain.from_iterable(scaled_widths(config, ratio) for ratio in ratios):
        if widths in tried:
            continue
        tried.add(widths)
        candidate = {**config, "block_out_channels": widths}
        kept = kept_by_shapes(cost, model, candidate)
        if kept is None:
            continue
        shares: dict[str, float] = {
            key: 1 - cost.total(kept, key) / cost.total({}, key) for key in counted(budget)
        }
        achieved = min(shares.values())
        if best is None or abs(achieved - sparsity) < best[0]:
            best = abs(achieved - sparsity), Allocation(kept, achieved, shares), candidate
    assert best is not None  # ratio 1 is always expressible
    return best[1], best[2]


def scaled_widths(config: Mapping[str, Any], ratio: float) -> Iterator[tuple[int, ...]]:
    """Stage widths near one ratio, in multiples of the norm groups; the first stage stays."""
    first, *stages = config["block_out_channels"]
    step = config["norm_num_groups"] or 4  # NCSN++ derives its groups: a quarter of the channels
    choices = [
        {min(width, max(step, step * rounded(width * ratio / step))) for rounded in (math.floor, math.ceil)}
        for width in stages
    ]
    for widths in itertools.product(*(sorted(choice) for choice in choices)):
        yield (first, *widths)


def kept_by_shapes(cost: CostModel, model: Any, config: Mapping[str, Any]) -> dict[str, int] | None:
    """Channels kept by each group in the stock network of a configuration; None if there is none."""
    options = dict(config)
    options["time_embedding_dim"] = options.get("time_embedding_dim") or options["block_out_channels"][0] * 4
    try:
        target = empty(type(model), options)
    except (ValueError, ZeroDivisionError):
        return None
    if target.state_dict().keys() != model.state_dict().keys():
        return (
            None  # a shortcut convolution appears or vanishes where two stages become, or were, equally wide
        )
    kept = {}
    for name, group in cost.groups.items():
        member = next(member for member in group.producers if member.kind != "norm")
        share = len(member.positions) // group.channels
        layer: Any = target.get_submodule(member.module)
        width = layer.weight.shape[1 if member.kind == "embedding" else 0]
        kept[name] = width // share
        if kept[name] % group.unit_size or not 0 < kept[name] <= group.channels:
            return None
    return kept if fits(cost, model, target, kept) else None


def fits(cost: CostModel, model: Any, target: Any, kept: Mapping[str, int]) -> bool:
    """Whether a network of these widths has the shapes of a stock one, layers without a group included.

    In U-Nets with text, the stock class ties the width inside an attention block to that of its stage, and no
    group has the former.
    """
    first = {
        name: torch.arange(group.units) < kept[name] // group.unit_size for name, group in cost.groups.items()
    }
    left = slice_state(model, cuts_of(model, tuple(cost.groups.values()), first))
    wanted = {name: tensor.shape for name, tensor in target.state_dict().items()}
    return all(left[name].shape == shape for name, shape in wanted.items())
