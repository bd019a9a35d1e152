"""The pruned network that an adapter is carried to, and what it says of the dense one."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.correspondence import Correspondence, Layer, read_correspondence
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear
from gfprune_cli.checkpoint.reader import build_meta, inspect
from gfprune_cli.checkpoint.record import RECORD, Record, read_record
from gfprune_cli.checkpoint.source import Source, resolve, source_of
from gfprune_cli.errors import GfpruneError, UsageError, named
from gfprune_cli.progress import Progress
from gfprune_cli.pruning.units import find_units
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.structure.correspondence import correspondence, kept_units


@dataclass(frozen=True)
class Target:
    """A pruned network.

    Args:
        component: where it lies.
        record: what it was pruned from.
    """

    recipe: CarryRecipe
    options: RunOptions
    source: Source
    component: Component
    record: Record
    progress: Progress

    @property
    def prefix(self) -> str:
        """What names of an adapter's tensors begin with, where they are for this network."""
        return self.component.name or ("unet" if "UNet" in self.component.class_name else "transformer")

    @cached_property
    def network(self) -> Any:
        """The pruned network, without weights."""
        return build_meta(self.component)

    @cached_property
    def dense_network(self) -> Any:
        """The dense one, likewise, from the configuration of the pruned one; in the native layout its names
        and their order alone are right."""
        config = {**self.component.stock_config, **self.map.config}
        name = stock_name(self.component.class_name)
        return build_meta(replace(self.component, class_name=name, config=config))

    def is_factored(self, name: str) -> bool:
        """Whether a layer of the pruned network is two thin ones now."""
        return isinstance(self.network.get_submodule(name), FactoredLinear)

    def place(self, old: str) -> tuple[str, Layer] | None:
        """(new name, what is left) of a layer of the dense network; None if it is gone.

        Of a layer that is two factors the first has what is left of the inputs, the second of the outputs.
        """
        found = self.map.layer(old)
        if found is None or layer_sizes(self.network, found[0]) is None or not self.is_factored(found[0]):
            return found
        name, layers = found[0], self.map.layers
        first, second = (layers.get(f"{name}.{number}", Layer(old)) for number in (0, 1))
        return name, Layer(old, second.out, first.into)

    @cached_property
    def map(self) -> Correspondence:
        """What each layer was.

        Raises:
            GfpruneError: the record has no map, and the dense model is not there.
        """
        found = read_correspondence(self.record.document, str(self.source.folder / RECORD))
        return self.reconstructed() if found is None else found

    def reconstructed(self) -> Correspondence:
        """The map of a record that was written without one, from the structure of the dense model."""
        settings = self.record.document.get("recipe") or {}
        network, groups, _ = find_units(
            self.dense,
            self.progress,
            width=bool(settings.get("prune_width")),
            blocks=bool(settings.get("blocks")),
        )
        groups = tuple(group for group in groups if group.name in self.record.kept)
        if {group.name for group in groups} != self.record.kept.keys():
            raise GfpruneError(
                f"{self.source.folder / RECORD} was written by another version, and its channels are not "
                f"found in {self.dense.root}: prune again"
            )
        return correspondence(network, groups, kept_units(groups, self.record.kept))

    @cached_property
    def dense(self) -> Component:
        """The dense model on disk.

        Raises:
            GfpruneError: it is not there, or has other weights than those that were pruned.
        """
        record, offline, progress = self.record, self.options.offline, self.progress
        with named(model="dense", teacher="dense"):
            if self.recipe.dense is None:
                source = record.dense_source(offline=offline, progress=progress)
            else:
                source = resolve(
                    self.recipe.dense, variant=record.variant, offline=offline, progress=progress
                )
        return inspect(source, component=record.component or None, variant=record.variant)


def find_target(recipe: CarryRecipe, options: RunOptions, progress: Progress) -> Target:
    """The network that a recipe names.

    Raises:
        UsageError: it was not pruned.
        GfpruneError: it cannot be read.
    """
    source = source_of(recipe, options, progress)
    record = read_record(source.folder, recipe.component)
    if record is None:
        raise UsageError(
            f"--model {recipe.model} was not pruned by gfprune (it has no {RECORD}): adapters of the dense "
            "model fit it as they are"
        )
    if recipe.component not in (None, record.component):
        raise UsageError(f"--component {recipe.component} was not pruned: {record.component} was")
    component = inspect(source, component=record.component or None, variant=recipe.variant)
    return Target(recipe, options, source, component, record, progress)


def layer_sizes(network: nn.Module, name: str) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer; None where there is none of that name, or it is no matrix."""
    try:
        layer: Any = network.get_submodule(name)
    except AttributeError:
        return None
    for out, into in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if hasattr(layer, out):
            return getattr(layer, out), getattr(layer, into)
    return None
