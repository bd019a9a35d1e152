"""Networks of classes that gfprune knows nothing of: what they take is what their pipeline passes to them."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.reader import Component
from gfprune_cli.data.conditioned import asked_of, recorded
from gfprune_cli.data.conditions import keywords
from gfprune_cli.data.recording import PipelineOptions
from gfprune_cli.progress import Report
from gfprune_cli.structure.examples import EXAMPLES


class RecordedNetwork(nn.Module):
    """A network with the inputs that its pipeline was seen to pass.

    Args:
        inputs: keyword arguments for one sample.
        time_factor: what timesteps of the scheduler are multiplied by.
    """

    def __init__(self, network: Any, inputs: dict[str, Any], time_factor: float) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.inputs, self.time_factor = inputs, time_factor

    def forward(self, **inputs: Any) -> Any:
        """What the network returns."""
        return self.network(**inputs)


def with_inputs(model: nn.Module, component: Component, scheduler: Any, report: Report) -> nn.Module:
    """`model`, or if its class is unknown and there is a pipeline around it, with inputs from there.

    Raises:
        GfpruneError: the pipeline cannot be run.
    """
    known = any(cls.__name__ in EXAMPLES for cls in type(model).__mro__)
    if known or component.pipeline is None:
        return model
    config: Any = model.config
    options = PipelineOptions()
    asked = asked_of(component, config, options, 1, 0, shuffled=False)
    found = recorded(model, component, scheduler, asked, options, report)
    single = {name: tensor[:1, -1:] for name, tensor in found.conditions.tensors.items()}
    conditions = replace(found.conditions, tensors=single, branches=1, rows=(0,))
    sample, timestep = torch.zeros(1, *found.shape), torch.ones(1)
    inputs = keywords(sample, timestep, conditions)
    del inputs["return_dict"]
    return RecordedNetwork(model, inputs, conditions.time_factor)
