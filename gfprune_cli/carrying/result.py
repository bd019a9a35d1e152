"""What a carry run did, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfprune_cli.checkpoint.record import SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class CarryResult:
    """What a carry run did; `document()` is the JSON of the command.

    Args:
        output: the folder; None for a dry run.
        kind: "lora", "ip-adapter", "controlnet" or "t2i-adapter".
        layers: `total`, and of them `narrowed`, `moved` to another block, and `dropped` for want of a place.
        dropped: their names in the dense network.
        bytes: of the tensors, `before` and `after`.
    """

    adapter: str
    model: str
    output: str | None
    kind: str
    component: str
    layers: Mapping[str, int]
    dropped: tuple[str, ...]
    bytes: Mapping[str, int]
    seconds: float

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "carry", **asdict(self)}
