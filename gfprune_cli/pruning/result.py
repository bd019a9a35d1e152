"""What a prune run did, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gfprune_cli.checkpoint.record import SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
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
    limit: Mapping[str, Any] | None = None
    time: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "prune", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class PruneResults:
    """What a prune run with several sparsities did, the least first; or that of every denoiser."""

    networks: tuple[PruneResult, ...]

    def document(self) -> dict[str, Any]:
        found = [asdict(network) for network in self.networks]
        return {"schema_version": SCHEMA_VERSION, "command": "prune", "networks": found}
