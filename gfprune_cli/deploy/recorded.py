"""Networks of classes that gfprune knows nothing of, with the inputs that their pipeline passes to them."""

from typing import Any

from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.inputs.unknown_classes import passed_inputs
from gfprune_cli.progress import Report


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
    found = passed_inputs(model, component, scheduler, report)
    return model if found is None else RecordedNetwork(model, found.inputs, found.time_factor)
