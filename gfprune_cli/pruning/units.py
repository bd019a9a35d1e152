"""The units of a checkpoint: channel groups, and blocks where they are asked for."""

from typing import Any

from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta, load_model
from gfprune_cli.families.table import has_known_inputs
from gfprune_cli.inputs.unknown_classes import pipeline_inputs
from gfprune_cli.progress import Progress
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.interfaces import beside_interfaces
from gfprune_cli.structure.removal import skeleton
from gfprune_cli.structure.trace import Trace


def find_units(
    component: Component,
    progress: Progress,
    *,
    width: bool,
    blocks: bool,
    interfaces: bool = False,
    folded: nn.Module | None = None,
) -> tuple[Any, tuple[ChannelGroup, ...], Trace]:
    """A network of the component's structure, its groups, and the trace of its forward pass.

    On the meta device; the weights of a class that gfprune does not know are read, as only its pipeline tells
    what it takes.

    Args:
        width: the residual width of transformers too.
        blocks: whole residual blocks too.
        interfaces: not the channels at which adapters enter.
        folded: what the component has become, with its weights; the network is its own structure then.

    Raises:
        GfpruneError: the network cannot be traced, or its pipeline cannot be run.
    """
    network, inputs = build_meta(component) if folded is None else skeleton(folded), None
    if not has_known_inputs(network) and component.weights and component.pipeline is not None:
        dense = load_model(component).requires_grad_(False)
        inputs = pipeline_inputs(dense, component, progress)
        network = dense if folded is None else folded
    groups, trace = discover(network, inputs, width=width)
    if interfaces:
        groups = beside_interfaces(network, groups)
    return network, groups + (block_groups(network) if blocks else ()), trace
