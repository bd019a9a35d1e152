"""Depth that the configuration of `UNet2DConditionModel` expresses, as in BK-SDM, SSD-1B and Vega.

Three kinds of units, each a residual block or several that go together:

    a layer      a residual block and its attention in the encoder, and the ones that read its skip connection
                 in the decoder: `layers_per_block`
    a block      of a transformer: `transformer_layers_per_block` and its reverse
    the middle   `mid_block_type`

Without its layer k the encoder hands on the same skip twice, so that the decoder may do without the block
that reads the second of the two: removal is exact. BK-SDM (arXiv 2305.15798, section 3.1) removes the same
pairs.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gfprune_cli.structure.groups import ChannelGroup, Member

CLASS = "UNet2DConditionModel"
LAYERS = "layers"  # the stack of all layers, and of the middle
TRANSFORMER_BLOCKS = "transformer_blocks"
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MIDDLE = "UNetMidBlock2DCrossAttn"


def stock_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """One group of one unit for all that the stock class may leave out; none of other classes."""
    if type(model).__name__.removeprefix("Pruned") != CLASS:
        return ()
    network: Any = model
    stages = len(network.down_blocks)
    found = [pair for stage in range(stages) for pair in layer_pairs(network, stage)]
    if is_middle(network.mid_block):
        found.append(["mid_block"])
    groups = [unit(names, LAYERS) for names in found]
    for names in tied_transformers(network):
        depth = len(transformer_blocks(network, names[0]))
        for number in range(depth) if depth > 1 else ():
            blocks = [f"{name}.{TRANSFORMER_BLOCKS}.{number}" for name in names]
            groups.append(unit(blocks, f"{names[0]}.{TRANSFORMER_BLOCKS}"))
    return tuple(groups)


def unit(modules: list[str], stack: str) -> ChannelGroup:
    """Blocks that go together, named after the first."""
    whole = torch.zeros(1, dtype=torch.long)
    members = tuple(Member(module, "out", "gate", whole, whole) for module in modules)
    return ChannelGroup(modules[0], 1, 1, whole.view(1, 1), members, stack)


def is_middle(block: Any) -> bool:
    return type(block).__name__ == MIDDLE


def layer_pairs(model: Any, stage: int) -> Iterator[list[str]]:
    """The layers of a stage but the first, which may widen, each with the layer of the decoder."""
    mirror = len(model.down_blocks) - 1 - stage
    down, up = model.down_blocks[stage], model.up_blocks[mirror]
    if type(down).__name__ not in DOWN or type(up).__name__ not in UP:
        return
    count = len(down.resnets)
    if len(up.resnets) != count + 1:
        return
    for layer in range(1, count):
        yield [
            f"{side}.{kind}.{number}"
            for side, block, number in (
                (f"down_blocks.{stage}", down, layer),
                (f"up_blocks.{mirror}", up, count - layer),
            )
            for kind in ("resnets", "attentions")
            if kind == "resnets" or getattr(block, "attentions", None) is not None
        ]


def transformer_blocks(model: Any, name: str) -> Any:
    return model.get_submodule(f"{name}.{TRANSFORMER_BLOCKS}")


def tied_transformers(model: Any) -> Iterator[list[str]]:
    """Transformers whose depths the configuration can tell apart, together with those that it cannot.

    The middle is as deep as the first transformer of the last stage, if that has some.
    """
    middle = "mid_block.attentions.0"
    first = f"down_blocks.{len(model.down_blocks) - 1}.attentions.0"
    names = [name for name, part in model.named_modules() if type(part).__name__ == "Transformer2DModel"]
    for name in names:
        if name == first and middle in names:
            yield [first, middle]
        elif name != middle or first not in names:
            yield [name]


def without_blocks(model: Any, gone: Collection[str]) -> tuple[dict[str, str | None], dict[str, Any]] | None:
    """What a network is called without some blocks.

    Returns:
        (module -> its new name, None for one that is gone, inner ones first; keys of the configuration that
        change), or None where the configuration cannot express it.
    """
    units = [[member.module for member in group.members] for group in stock_groups(model)]
    if not set(gone) <= {name for names in units for name in names}:
        return None
    left = Left(model, frozenset(gone))
    return (left.moved(), left.config()) if left.fits() else None


@dataclass(frozen=True)
class Left:
    """What is left of a U-Net, as the numbers that things have in the dense one."""

    model: Any
    gone: frozenset[str]

    @property
    def sides(self) -> list[list[str]]:
        """The names of the blocks of encoder and decoder."""
        count = range(len(self.model.down_blocks))
        return [[f"{side}.{number}" for number in count] for side in ("down_blocks", "up_blocks")]

    def numbers(self, block: str, kind: str) -> list[int]:
        """Of the residual blocks or attentions that a block keeps."""
        parts = getattr(self.model.get_submodule(block), kind, None) or ()
        return [number for number in range(len(parts)) if f"{block}.{kind}.{number}" not in self.gone]

    def depths(self, block: str) -> list[int]:
        """Blocks that each attention keeps, of those that stay."""
        return [
            len(self.blocks(f"{block}.attentions.{number}")) for number in self.numbers(block, "attentions")
        ]

    def blocks(self, attention: str) -> list[int]:
        """Numbers of the blocks that a transformer keeps."""
        count = range(len(transformer_blocks(self.model, attention)))
        return [n for n in count if f"{attention}.{TRANSFORMER_BLOCKS}.{n}" not in self.gone]

    @property
    def middle(self) -> list[int]:
        """The depth of the attention in the middle; empty without it."""
        known = is_middle(self.model.mid_block) and "mid_block" not in self.gone
        return self.depths("mid_block") if known else []

    def fits(self) -> bool:
        """Whether encoder and decoder lose the same layers, and the middle is as deep as it has to be."""
        down, up = self.sides
        for encoder, decoder in zip(down, reversed(up), strict=True):
            layers = self.numbers(encoder, "resnets")
            count = len(self.model.get_submodule(encoder).resnets)
            mirrored = [count - layer for layer in range(count) if layer not in layers]
            expected = [layer for layer in range(count + 1) if layer not in mirrored]
            if layers != list(range(count)) and self.numbers(decoder, "resnets") != expected:
                return False
        same = all(
            self.numbers(block, "attentions") in ([], self.numbers(block, "resnets")) for block in down + up
        )
        last = self.depths(down[-1])
        return same and (not self.middle or not last or self.middle[0] == last[0])

    def moved(self) -> dict[str, str | None]:
        """New names of what moved or is gone; what lies in another comes before it."""
        inner: dict[str, str | None] = {}
        outer: dict[str, str | None] = {}
        for block in (*self.sides[0], *self.sides[1], *(["mid_block"] if self.middle else [])):
            for kind in ("resnets", "attentions"):
                for new, old in enumerate(self.numbers(block, kind)):
                    if kind == "attentions":
                        inner |= self.renumbered(f"{block}.{kind}.{old}", f"{block}.{kind}.{new}")
                    if new != old:
                        outer[f"{block}.{kind}.{old}"] = f"{block}.{kind}.{new}"
        return {**dict.fromkeys(sorted(self.gone)), **inner, **outer}

    def renumbered(self, attention: str, name: str) -> dict[str, str]:
        """Of the blocks of a transformer that has a new name; empty where all stay."""
        left, whole = self.blocks(attention), len(transformer_blocks(self.model, attention))
        pairs = enumerate(left) if len(left) < whole else ()
        return {
            f"{attention}.{TRANSFORMER_BLOCKS}.{old}": f"{name}.{TRANSFORMER_BLOCKS}.{new}"
            for new, old in pairs
        }

    def config(self) -> dict[str, Any]:
        """The keys that differ from those of the dense network."""
        down, up = self.sides
        given = self.model.config.transformer_layers_per_block
        given = [given] * len(down) if isinstance(given, int) else list(given)
        encoder = [self.depths(block) or entry for block, entry in zip(down, given, strict=True)]
        if self.middle and not self.depths(down[-1]):
            encoder[-1] = self.middle
        decoder = [self.depths(block) or entry for block, entry in zip(up, reversed(encoder), strict=True)]
        layers = [len(self.numbers(block, "resnets")) for block in down]
        transformers = [alike(entry) for entry in encoder]
        reverse = [alike(entry) for entry in decoder]
        plain = reverse == transformers[::-1] and all(isinstance(entry, int) for entry in transformers)
        return {
            "layers_per_block": alike(layers),
            "transformer_layers_per_block": alike(transformers) if plain else transformers,
            "reverse_transformer_layers_per_block": None if plain else reverse,
            **({"mid_block_type": None} if "mid_block" in self.gone else {}),
        }


def alike(numbers: Any) -> Any:
    """One number in the place of a list of equal ones."""
    if isinstance(numbers, int):
        return numbers
    same = all(isinstance(number, int) and number == numbers[0] for number in numbers)
    return numbers[0] if same else list(numbers)
