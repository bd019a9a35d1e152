"""Pruned pipelines without a pruning run: half of the units of every group, chosen at random."""

from pathlib import Path
from typing import Any

import torch
from pipelines import FAMILIES

from gfprune_cli.checkpoint.correspondence import MAP
from gfprune_cli.checkpoint.reader import inspect, load_model, sha256_of_weights
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import write_checkpoint
from gfprune_cli.progress import silent
from gfprune_cli.pruning.units import find_units
from gfprune_cli.structure.correspondence import correspondence
from gfprune_cli.structure.groups import ChannelGroup, select
from gfprune_cli.structure.removal import remove


class Pruned:
    """A dense pipeline `dense` and a pruned one `folder`, on disk.

    Args:
        blocks: whole blocks go as well, the first of each stack that may.
        width: of transformers, the residual width too.
        interfaces: where adapters enter, everything stays.
        only: part of the names of the groups that lose units; the others stay whole.
    """

    def __init__(
        self,
        family: str,
        place: Path,
        *,
        blocks: bool = False,
        width: bool = False,
        interfaces: bool = False,
        only: str = "",
    ) -> None:
        self.dense = FAMILIES[family](place / "dense")
        self.component = inspect(resolve(str(self.dense)))
        found = find_units(self.component, silent, width=width, blocks=blocks, interfaces=interfaces)
        self.network, self.groups, _ = found
        self.kept = {
            name: kept if only in name else torch.ones_like(kept)
            for name, kept in chosen(self.groups).items()
        }
        self.folder = place / "pruned"
        pruned = remove(self.load(), self.groups, self.kept)
        record = self.record(type(pruned).__name__, blocks=blocks, width=width)
        write_checkpoint(self.folder, pruned, self.component, record, force=False)

    def load(self) -> Any:
        """The dense network."""
        return load_model(self.component).requires_grad_(False)

    def record(self, class_name: str, *, blocks: bool, width: bool) -> dict[str, Any]:
        """What `prune` would write, as far as it is read again."""
        source = {"label": str(self.dense), "kind": "local", "commit": None}
        channels = {group.name: group.kept_channels(self.kept[group.name]).tolist() for group in self.groups}
        change = {"before": 2, "after": 1}
        return {
            "schema_version": 1,
            "command": "prune",
            "recipe": {"criterion": "taylor", "layout": "adaptive", "blocks": blocks, "prune_width": width},
            "source": {**source, "weights": sha256_of_weights(self.component), "data": None},
            "class_name": class_name,
            "component": self.component.name,
            "kept": channels,
            MAP: correspondence(self.network, self.groups, self.kept).document(),
            "sparsity": {"achieved": 0.5, "of": "params"},
            **dict.fromkeys(("params", "macs", "bytes"), change),
            "loss": {"before": 1.0, "removed": 1.0},
        }


def chosen(groups: tuple[ChannelGroup, ...]) -> dict[str, torch.Tensor]:
    """Group name -> bool [units]."""
    source = torch.Generator().manual_seed(0)
    stacks: set[str] = set()
    kept = {}
    for group in groups:
        half = max(group.step, group.channels // 2 // group.step * group.step)
        kept[group.name] = select(group, torch.rand(group.units, generator=source), half)
        if group.stack:
            kept[group.name] = torch.tensor([group.stack in stacks])
            stacks.add(group.stack)
    return kept
