"""Which part of the dense network each part of a pruned one is: the key `map` of `gfprune.json`.

    {"blocks": {"blocks.1": "blocks.3"},
     "gone": ["blocks.1", "blocks.2"],
     "config": {"num_layers": 4},
     "layers": {"blocks.1.attn.to_q": {"was": "blocks.3.attn.to_q", "out": "0-31,64-95 of 128"}}}

Blocks that are not named kept their name, layers that are not named their size, and keys of the stock
configuration their value. Values are those of the dense network; indices are those of the dense layer,
ascending, in ranges that include both ends, then the size that the dense layer had.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gfprune_cli.errors import GfpruneError

MAP = "map"
MOST = 1 << 24  # of the indices of one layer


@dataclass(frozen=True)
class Stays:
    """What is left of one dimension of a dense layer.

    Args:
        indices: ascending.
        size: of the dimension in the dense layer.
    """

    indices: tuple[int, ...]
    size: int

    def text(self) -> str:
        """As it is written: "0-31,40,64-95 of 128"."""
        parts = []
        for _, run in itertools.groupby(enumerate(self.indices), lambda pair: pair[1] - pair[0]):
            values = [value for _, value in run]
            parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
        return f"{','.join(parts)} of {self.size}"

    @classmethod
    def parse(cls, text: str) -> "Stays":
        """What a text says.

        Raises:
            ValueError: it is no such text, or its indices do not ascend.
        """
        ranges, _, size = text.partition(" of ")
        last, found = int(size), [-1]
        for part in ranges.split(","):
            begin, _, end = part.partition("-")
            first, stop = int(begin), int(end or begin) + 1
            if not found[-1] < first < stop <= last <= MOST:
                raise ValueError(f"{part[:40]!r} is no range of {last}")
            found.extend(range(first, stop))
        return cls(tuple(found[1:]), last)


@dataclass(frozen=True)
class Layer:
    """What one layer of a pruned network was.

    Args:
        was: its name in the dense network.
        out: which of the dense layer's outputs are left; None where all are.
        into: which of its inputs, likewise.
        scale: factor on its weights and bias that removal put there (queries of a head that became narrower).
    """

    was: str
    out: Stays | None = None
    into: Stays | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Correspondence:
    """From the dense network to the pruned one.

    Args:
        blocks: new name of a block -> its name in the dense network, where the two differ.
        gone: blocks of the dense network that are not there any more.
        layers: new name of a layer -> what it was, for each layer that became smaller.
        config: keys of the stock configuration that changed as blocks went -> their dense values.
    """

    blocks: Mapping[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    layers: Mapping[str, Layer] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def new_name(self, old: str) -> str | None:
        """What a layer or block of the dense network is called now; None if it is gone."""
        names: dict[str, str | None] = {block: new for new, block in self.blocks.items()}
        names |= dict.fromkeys(self.gone)
        around = [block for block in names if old == block or old.startswith(f"{block}.")]
        if not around:
            return old
        block = max(around, key=len)  # blocks that moved may lie in others that did
        new = names[block]
        return None if new is None else new + old[len(block) :]

    def layer(self, old: str) -> tuple[str, Layer] | None:
        """(new name, what is left) of a layer of the dense network; None if it is gone."""
        new = self.new_name(old)
        return None if new is None else (new, self.layers.get(new, Layer(old)))

    def document(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "blocks": dict(self.blocks),
            "gone": list(self.gone),
            "config": dict(self.config),
            "layers": {name: layer_document(name, layer) for name, layer in self.layers.items()},
        }


def layer_document(name: str, layer: Layer) -> dict[str, Any]:
    """One layer, without what goes without saying."""
    found: dict[str, Any] = {} if layer.was == name else {"was": layer.was}
    for key, stays in (("out", layer.out), ("in", layer.into)):
        if stays is not None:
            found[key] = stays.text()
    return found if layer.scale == 1 else {**found, "scale": layer.scale}


def read_correspondence(document: Mapping[str, Any], where: str) -> Correspondence | None:
    """The correspondence that a record holds; None where it was written before there was one.

    Args:
        where: the file, for messages.

    Raises:
        GfpruneError: it is damaged.
    """
    if MAP not in document:
        return None
    try:
        found = document[MAP]
        blocks, gone = dict(found["blocks"]), tuple(found["gone"])
        config = dict(found["config"])
        names = [*blocks, *blocks.values(), *gone, *found["layers"]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name is no text")
        layers = {name: parsed_layer(name, entry) for name, entry in found["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GfpruneError(
            f"{where} is damaged: {MAP}: {str(error)[:120]}; prune again, or restore it"
        ) from None
    return Correspondence(blocks, gone, layers, config)


def parsed_layer(name: str, entry: Mapping[str, Any]) -> Layer:
    """One layer of the document."""
    out, into = (None if entry.get(key) is None else Stays.parse(entry[key]) for key in ("out", "in"))
    was, scale = entry.get("was", name), float(entry.get("scale", 1))
    if not isinstance(was, str) or not 0 < scale < float("inf"):
        raise ValueError(f"{name[:80]!r}")
    return Layer(was, out, into, scale)
