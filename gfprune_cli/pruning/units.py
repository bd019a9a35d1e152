"""The units of a checkpoint: channel groups, and blocks where they are asked for."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.layout import predicts
from gfprune_cli.checkpoint.reader import build_meta, load_model
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.table import has_known_inputs
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.inputs.unknown_classes import pipeline_inputs
from gfprune_cli.progress import Progress, notice
from gfprune_cli.pruning.verify import check_removal, noisy
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.interfaces import beside_interfaces
from gfprune_cli.structure.removal import skeleton
from gfprune_cli.structure.trace import Trace

Groups = tuple[ChannelGroup, ...]


def find_units(
    component: Component,
    progress: Progress,
    *,
    width: bool,
    blocks: bool,
    stages: bool = False,
    stock: bool = False,
    interfaces: bool = False,
    folded: nn.Module | None = None,
    options: PipelineOptions | None = None,
) -> tuple[Any, Groups, Trace]:
    """A network of the component's structure, its groups, and the trace of its forward pass.

    On the meta device; the weights of a class that gfprune does not know are read, as only its pipeline tells
    what it takes, and groups of it whose removal is not exact are left out.

    Args:
        width: the residual width of transformers too.
        blocks: whole residual blocks too.
        stock: of blocks only those that the stock class can leave out.
        stages: whole stages of a U-Net, and with them what must be as wide as its stage.
        interfaces: not the channels at which adapters enter; those of a pipeline that has some stay anyway.
        folded: what the component has become, with its weights; the network is its own structure then.
        options: what the pipeline of a class that gfprune does not know is asked for.

    Raises:
        GfpruneError: the network cannot be traced, or its pipeline cannot be run.
    """
    network, inputs = build_meta(component) if folded is None else skeleton(folded), None
    if not has_known_inputs(network) and component.weights:
        dense = load_model(component).requires_grad_(False)
        inputs = pipeline_inputs(dense, component, progress, options)
        if inputs is None:  # noise, as experts that no token is sent to would not be seen
            inputs = noisy(example_inputs(dense), next(dense.parameters()).dtype)
        network = dense if folded is None else folded
    groups, trace = discover(network, inputs, width=width, stages=stages)
    if inputs is not None:
        groups = exact_groups(network, groups, inputs, progress)
    if interfaces or has_attached(component):
        groups = beside_interfaces(network, groups)
    return network, groups + (block_groups(network, stock=stock) if blocks else ()), trace


def has_attached(component: Component) -> bool:
    """Whether the pipeline has a network that adds to the states of this one."""
    if not predicts(component.class_name):
        return False
    return any("ControlNet" in name or "Adapter" in name for _, name in component.entries.values())


def exact_groups(network: nn.Module, groups: Groups, inputs: Mapping[str, Any], progress: Progress) -> Groups:
    """The groups whose channels leave without changing the masked network.

    Layers of the same name in different blocks are judged together.

    Raises:
        GfpruneError: none of them; says where the first difference is.
    """
    try:
        if groups:
            check_removal(network, groups, inputs)
        return groups
    except GfpruneError as error:
        first = error
    kept: Groups = ()
    for pattern in dict.fromkeys(map(pattern_of, groups)):
        tried = tuple(group for group in groups if group in kept or pattern_of(group) == pattern)
        try:
            check_removal(network, tried, inputs)
            kept = tried
        except GfpruneError:
            notice(progress, f"{pattern} stays as it is: its removal would not be exact")
    if not kept:
        raise first
    return kept


def pattern_of(group: ChannelGroup) -> str:
    """The name of a group, for all blocks."""
    return re.sub(r"\d+", "N", group.name)
