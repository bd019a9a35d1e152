"""What a prune run did, as numbers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1
TOOLS = ("gfprune", "torch", "diffusers", "safetensors", "torch-pruning")


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
    refit: Mapping[str, Any] | None
    seconds: float
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    fold: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "prune", **asdict(self)}


def as_json(value: Any) -> Any:
    """A configuration as JSON keeps it: tuples as lists, and what is no JSON as text (-Infinity, too)."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def installed_tools() -> dict[str, str | None]:
    """Versions of what decides the bytes of an output."""
    return {tool: installed_version(tool) for tool in TOOLS}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
