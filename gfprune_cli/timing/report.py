"""Where the time of a network goes, and what a budget of time would leave, as an analysis shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gfprune_cli.structure.cost import BOTH, COSTS, TIME, CostModel
from gfprune_cli.timing.budget import Scores, TimeBudget


@dataclass(frozen=True, kw_only=True)
class SpeedupReport:
    """What one speed-up would leave, with every unit counted as equally important; times are predicted."""

    speedup: float
    achieved: float
    ms: float
    removed: Mapping[str, float]
    params: int
    macs: int
    bytes: int
    kept: Mapping[str, int]


def speedup_report(
    target: float, budget: TimeBudget, cost: CostModel, scores: Scores, width: int
) -> SpeedupReport:
    """Widths for one speed-up in the adaptive layout.

    Args:
        width: bytes of a stored parameter.

    Raises:
        UsageError: it is out of reach.
    """
    asked = budget.asking(speedup=target, latency=None)
    kept = asked.widths(cost, scores, 0.0).kept
    predicted = cost.before(TIME) / cost.total(kept, TIME)
    return SpeedupReport(
        speedup=target,
        achieved=predicted,
        ms=budget.table.ms[0] / predicted,
        **left_by(cost, kept, width),
    )


def left_by(cost: CostModel, kept: Mapping[str, int], width: int) -> dict[str, Any]:
    """What some widths leave, as an analysis says it.

    Args:
        width: bytes of a stored parameter.
    """
    params, removed = cost.params(kept), cost.gone(kept, BOTH)
    return dict(removed=removed, params=params, macs=cost.macs(kept), bytes=params * width, kept=dict(kept))


def time_report(budget: TimeBudget, cost: CostModel) -> dict[str, Any]:
    """The time of the dense network: measured as a whole, and shared out among its layers.

    Returns:
        `ms` with quartiles, where it was measured, `launching` (share of it that no width takes away) and
        `layers` [{name, ms, params, macs}] in the order of the network's modules.
    """
    assert cost.times is not None
    whole = cost.removed({})
    layers: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(cost.layers):
        entry = layers.setdefault(layer.name, {"name": layer.name, "ms": 0.0, "params": 0, "macs": 0})
        entry["ms"] += cost.of_layers([number], whole, TIME)
        for key in ("params", "macs"):
            entry[key] += COSTS[key].of_layer(layer, whole)
    ms, low, high = budget.table.ms
    scale = ms / cost.before(TIME)  # the parts of what was measured
    for entry in layers.values():
        entry["ms"] *= scale
    launching = cost.times.launching(np.arange(len(cost.layers))) / cost.before(TIME)
    return {
        "where": budget.table.where,
        "ms": ms,
        "low": low,
        "high": high,
        "steady": budget.table.steady,
        "launching": min(1.0, launching),
        "layers": [entry for entry in layers.values() if entry["ms"] > 0],
    }
