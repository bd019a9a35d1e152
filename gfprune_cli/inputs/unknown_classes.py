"""Networks of classes that gfprune knows nothing of: what they take is what their pipeline passes to them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.diffusion.conditions import Conditions, keywords
from gfprune_cli.families.table import has_known_inputs
from gfprune_cli.inputs.conditioning import asked_of, recorded
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.progress import Progress


@dataclass(frozen=True)
class Passed:
    """What a pipeline was seen to pass.

    Args:
        inputs: keyword arguments of the network for one sample.
        time_factor: what timesteps of the scheduler are multiplied by.
        shared: those, by name as in `Conditions`, that are passed once for the whole batch.
    """

    inputs: dict[str, Any]
    time_factor: float
    shared: frozenset[str]


def passed_inputs(
    model: nn.Module,
    component: Component,
    scheduler: Any,
    progress: Progress,
    options: PipelineOptions | None = None,
) -> Passed | None:
    """What the pipeline around a network passes to it; None if its class is known, or there is no pipeline.

    Args:
        model: with its weights.
        options: what the pipeline is asked for; the prompts are the built-in ones.

    Raises:
        GfpruneError: the pipeline cannot be run.
    """
    if has_known_inputs(model) or component.pipeline is None:
        return None
    config: Any = model.config
    options = replace(options or PipelineOptions(), prompts=None)
    asked = asked_of(component, config, options, 1, 0, shuffled=False)
    found = recorded(model, component, scheduler, asked, options, progress)
    conditions = conditional(found.conditions)
    inputs = keywords(torch.zeros(1, *found.shape), torch.ones(1), conditions)
    inputs.pop("return_dict", None)
    shared = frozenset(conditions.shared.keys() - set(conditions.lists))
    return Passed(inputs, conditions.time_factor, shared)


def conditional(conditions: Conditions) -> Conditions:
    """Those of the first sample, without its unconditional branch."""
    branches = conditions.branches
    single = {name: tensor[:1].chunk(branches, 1)[-1] for name, tensor in conditions.tensors.items()}
    lists = {
        name: value[-(len(value) // branches) :] if name in conditions.lists else value
        for name, value in conditions.shared.items()
    }
    return replace(conditions, tensors=single, shared=lists, branches=1, rows=(0,))


def pipeline_inputs(
    network: nn.Module, component: Component, progress: Progress, options: PipelineOptions | None = None
) -> dict[str, Any] | None:
    """What `discover` needs to run a network: None where its class is known."""
    passed = passed_inputs(network, component, load_scheduler(component), progress, options)
    return None if passed is None else passed.inputs


class RecordedNetwork(nn.Module):
    """A network with the inputs that its pipeline was seen to pass.

    Args:
        found: which those are.
    """

    def __init__(self, network: Any, found: Passed) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.inputs, self.time_factor, self.shared = found.inputs, found.time_factor, found.shared

    def forward(self, **inputs: Any) -> Any:
        """What the network returns."""
        return self.network(**inputs)


def with_inputs(model: nn.Module, component: Component, scheduler: Any, progress: Progress) -> nn.Module:
    """`model`, or if its class is unknown and there is a pipeline around it, with inputs from there.

    Raises:
        GfpruneError: the pipeline cannot be run.
    """
    found = passed_inputs(model, component, scheduler, progress)
    return model if found is None else RecordedNetwork(model, found)
