"""Depth: whole residual blocks as units, beside channels and heads.

A residual block computes out = in + f(in). Behind a mask m it is out = in + m * f(in), which at m = 0 is a
block that is not there: removal is exact.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.families.table import carriers, pairs
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.unet_depth import stock_groups, unit, without_blocks

# stack of blocks -> the key of the stock configuration that says how many there are
LENGTHS = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
    "blocks": "num_layers",
}
DUAL = "dual_attention_layers"  # a key of Stable Diffusion 3.5: the numbers of its blocks that attend twice
BY_NUMBER = ("layer_types",)  # keys that name blocks by number: with one of them set, the numbers must stay
RESNETS = "resnets"


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, stack) of every block whose input and output are the same stream."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if is_plain_resnet(module):
            yield names[id(module)], RESNETS
        elif isinstance(module, nn.ModuleList) and is_stack(module):
            for block in module:
                if not is_needed(block, block is module[0]):
                    yield names[id(block)], names[id(module)]


def is_plain_resnet(module: Any) -> bool:
    """A convolutional block that keeps width and resolution."""
    if type(module).__name__ != "ResnetBlock2D" or module.conv_shortcut is not None:
        return False
    same = module.conv1.in_channels == module.conv2.out_channels
    return same and module.upsample is None and module.downsample is None


def is_stack(blocks: nn.ModuleList) -> bool:
    """Several transformer blocks of one kind, whose streams are known."""
    kinds = {type(block).__name__ for block in blocks}
    return len(blocks) > 1 and len(kinds) == 1 and kinds <= carriers()


def is_needed(block: Any, first: bool) -> bool:
    """Whether the network needs this very block.

    The last block of SD3 drops the text stream. DiT's output layer reads the time embedding of the first
    block.
    """
    embeds = getattr(getattr(block, "norm1", None), "emb", None) is not None
    return bool(getattr(block, "context_pre_only", False)) or (first and embeds)


def block_groups(model: nn.Module, *, stock: bool = False) -> tuple[ChannelGroup, ...]:
    """One group of one unit for each residual block that may go.

    Args:
        stock: only what the configuration of the stock class can leave out.
    """
    if stock:
        shorter = {stack: key for stack, key in LENGTHS.items() if has_length(model, stack, key)}
        return stock_groups(model) + tuple(g for g in block_groups(model) if g.stack in shorter)
    return tuple(unit([name], stack) for name, stack in residual_blocks(model))


def inside(group: ChannelGroup, block: ChannelGroup) -> bool:
    """Whether a group of channels lives in one block alone, and goes with it."""
    return not group.is_block and all(block.holds(member.module) for member in group.members)


def floor_of_stack(blocks: int, ratio: float) -> int:
    """Blocks of a stack that stay whatever their scores: at least one, and at least `ratio` of them."""
    return max(1, round(blocks * ratio))


def streams_of(module: nn.Module, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    """The inputs of a block that its outputs continue, in the order of its outputs.

    In a decoder the stream comes first, and beside it a skip connection.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    names = pairs().get(type(module).__name__)
    if names:
        return tuple(given[name] for name in names)
    stream = next(iter(given.values()))
    return (stream[:, : module.out_channels] if type(module).__name__ == "ResnetBlock2D" else stream,)


def gate(module: nn.Module, mask: torch.Tensor, args: Any, kwargs: Any, output: Any) -> Any:
    """in + mask * (out - in), for each stream of a block.

    Args:
        mask: scalar.
        args, kwargs: what the block was called with.
    """

    def blend(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        # under autocast a block may return another type than it was given
        return torch.lerp(before.to(after.dtype), after, mask.to(after))

    streams = streams_of(module, args, kwargs)
    if isinstance(output, torch.Tensor):
        return blend(streams[0], output)
    return tuple(blend(before, after) for before, after in zip(streams, output, strict=True))


@dataclass(frozen=True)
class Depth:
    """What the removal of blocks does to names and configuration.

    Args:
        moved: block -> its new name; None for a block that is gone.
        config: keys of the stock configuration that change.
        skipped: blocks that become the identity, as no key of the configuration can leave them out.
    """

    moved: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def rename(self, name: str) -> str | None:
        """The new name of a module or tensor; None if it is gone."""
        for block, target in self.moved.items():
            if name == block or name.startswith(f"{block}."):
                return None if target is None else target + name[len(block) :]
        return name

    def renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping by name, without what is gone."""
        found = {self.rename(name): value for name, value in values.items()}
        return {name: value for name, value in found.items() if name is not None}


def depth_of(model: nn.Module, groups: Iterable[ChannelGroup], kept: Mapping[str, torch.Tensor]) -> Depth:
    """What goes, given group name -> bool [units]."""
    network: Any = model
    gone = [group for group in groups if group.is_block and not bool(kept[group.name].all())]
    modules = [member.module for group in gone for member in group.members]
    found = without_blocks(model, modules) if gone else None
    if found is not None:
        return Depth(*found)
    moved: dict[str, str | None] = {}
    config: dict[str, Any] = {}
    skipped = []
    for stack in dict.fromkeys(group.stack for group in gone):
        names = [group.name for group in gone if group.stack == stack]
        moved |= dict.fromkeys(names)
        key = LENGTHS.get(stack)
        if key is None or not can_shorten(model, stack, key):
            skipped += names
            continue
        blocks = network.get_submodule(stack)
        left = [index for index in range(len(blocks)) if f"{stack}.{index}" not in names]
        moved |= {f"{stack}.{old}": f"{stack}.{new}" for new, old in enumerate(left)}
        config[key] = len(left)
        if twice := network.config.get(DUAL):
            config[DUAL] = [new for new, old in enumerate(left) if old in twice]
    return Depth(moved, config, tuple(skipped))


def has_length(model: Any, stack: str, key: str) -> bool:
    """Whether a network has a stack that its stock class builds shorter."""
    return isinstance(getattr(model, stack, None), nn.ModuleList) and can_shorten(model, stack, key)


def can_shorten(model: Any, stack: str, key: str) -> bool:
    """Whether the stock class builds a shorter stack when its configuration says so."""
    config = model.config
    return config.get(key) == len(model.get_submodule(stack)) and not any(
        config.get(name) for name in BY_NUMBER
    )
