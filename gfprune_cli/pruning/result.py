"""What a prune run did, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PruneResult:
    """What a prune run did; `document()` is the JSON of the command."""

    model: str
    output: str | None
    component: str
    class_name: str
    layout: str
    criterion: str
    seed: int
    sparsity: Mapping[str, Any]
    params: Mapping[str, int]
    macs: Mapping[str, int]
    bytes: Mapping[str, int]
    loss: Mapping[str, float | None]
    scoring_gradients: float
    seconds: float

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "prune", **asdict(self)}
