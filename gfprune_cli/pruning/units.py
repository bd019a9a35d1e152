"""The units of a checkpoint: channel groups, and blocks where they are asked for."""

from typing import Any

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta, load_model
from gfprune_cli.families.table import is_known
from gfprune_cli.inputs.unknown_classes import pipeline_inputs
from gfprune_cli.progress import Report
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.interfaces import beside_interfaces
from gfprune_cli.structure.trace import Trace


def find_units(
    component: Component, report: Report, *, width: bool, blocks: bool, interfaces: bool = False
) -> tuple[Any, tuple[ChannelGroup, ...], Trace]:
    """A network of the component's structure, its groups, and the trace of its forward pass.

    On the meta device; the weights of a class that gfprune does not know are read, as only its pipeline tells
    what it takes.

    Args:
        width: the residual width of transformers too.
        blocks: whole residual blocks too.
        interfaces: not the channels at which adapters enter.

    Raises:
        GfpruneError: the network cannot be traced, or its pipeline cannot be run.
    """
    network, inputs = build_meta(component), None
    if not is_known(network) and component.weights and component.pipeline is not None:
        network = load_model(component).requires_grad_(False)
        inputs = pipeline_inputs(network, component, report)
    groups, trace = discover(network, inputs, width=width)
    if interfaces:
        groups = beside_interfaces(network, groups)
    return network, groups + (block_groups(network) if blocks else ()), trace
