"""The document of `gfprune.json`: enough to repeat a run and to build on it."""

from dataclasses import asdict
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.correspondence import MAP
from gfprune_cli.checkpoint.reader import build_meta
from gfprune_cli.checkpoint.record import SCHEMA_VERSION, installed_tools
from gfprune_cli.outputs.state import run_digest
from gfprune_cli.pruning.flows import JUDGE_DRAWS
from gfprune_cli.pruning.job import PruneJob
from gfprune_cli.pruning.plan import sparsity_of
from gfprune_cli.pruning.state import Outcome
from gfprune_cli.runtime.memory import parameter_count
from gfprune_cli.structure.correspondence import correspondence


def make_record(job: PruneJob, number: int, model: nn.Module, outcome: Outcome) -> dict[str, Any]:
    """The document of `gfprune.json`: enough to repeat the run and to build on it.

    Args:
        number: of the network, where a run makes several.
    """
    plan, recipe = job.plan, job.recipe.up_to(number)
    channels = {group.name: group.kept_channels(outcome.kept[group.name]) for group in plan.groups}
    widths = {name: len(indices) for name, indices in channels.items()}
    params = parameter_count(model)
    assert params == plan.cost.params(widths), "the cost model and the network disagree"
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "prune",
        "recipe": recipe.document(),
        "resolved": {
            "precision": job.precision,
            "device": job.device.type,
            "processes": job.processes.count,
            "fold": plan.fold,
            "short_of_memory": job.memory.gave(),
        },
        "source": {**job.source.origin(job.hashes), "data": job.data_fingerprint},
        "class_name": type(model).__name__,
        "component": plan.component.name,
        "kept": {name: indices.tolist() for name, indices in channels.items()},
        MAP: correspondence(build_meta(plan.component), job.given.groups, outcome.kept).document(),
        "sparsity": sparsity_of(plan.cost, widths, recipe),
        "time": None if plan.time is None else plan.time.document(plan.cost, widths),
        "params": {"before": plan.cost.before("params"), "after": params},
        "macs": {"before": plan.cost.before("macs"), "after": plan.cost.macs(widths)},
        "bytes": {"before": plan.component.bytes, "after": 0},
        "loss": {key: outcome.losses.get(key) for key in ("before", "masked", "removed", "recovered")},
        "refit": {"draws": JUDGE_DRAWS, "iterations": [asdict(refit) for refit in outcome.refits]},
        "fold": None if job.folding is None else job.folding.document(),
        "limit": outcome.limit,
        "scoring_gradients": round(outcome.gradients, 2),
        "run": run_digest(job.identity(number)),
        "tools": installed_tools(),
    }
