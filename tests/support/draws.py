"""Fewer draws and repeats than by default: the arithmetic is the same, and a run takes half as long."""

from collections.abc import Callable
from importlib import import_module
from inspect import unwrap
from typing import Any

FEW: dict[str, Any] = {
    "gfprune_cli.flow.loop:COMPARED_SAMPLES": 4,
    "gfprune_cli.flow.loop:REFIT_SAMPLES": 16,
    "gfprune_cli.pruning.flows:REFIT_SAMPLES": 16,
    "gfprune_cli.pruning.flows:JUDGE_DRAWS": 16,
    "gfprune_cli.pruning.record:JUDGE_DRAWS": 16,
    "gfprune_cli.pruning.analyze:PROBE_DRAWS": 16,
    "gfprune_cli.pruning.fold:FIT": 192,
    "gfprune_cli.pruning.fold:CHOOSE": 64,
    "gfprune_cli.pruning.fold:CHECKED": {"check": 64},
    "gfprune_cli.recovery.job:REPORT_DRAWS": 32,
    "gfprune_cli.evaluation.teacher:LOSS_DRAWS": 32,
    "gfprune_cli.evaluation.job:REPEATS": 5,
}
LOSS_DRAWS = (32,)  # behind each loss of a pruning run
ALL: dict[str, Any] = {}  # the numbers that users get, once they were replaced


def few_draws(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Set the constants of this process; `setattr` may be that of a pytest.MonkeyPatch."""
    for name, value in FEW.items():
        module, _, constant = name.partition(":")
        ALL.setdefault(name, getattr(import_module(module), constant))
        setattr(import_module(module), constant, value)
    job = import_module("gfprune_cli.pruning.job").PruneJob
    for method in (job.loss, job.losses):
        setattr(unwrap(method), "__defaults__", LOSS_DRAWS)
