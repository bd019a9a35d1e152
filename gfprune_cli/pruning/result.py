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


@dataclass(frozen=True)
class FoldedLayer:
    """One linear layer [in -> out] at its rank; `error` is that of its outputs on what was held out."""

    name: str
    inputs: int
    outputs: int
    rank: int
    error: float


@dataclass(frozen=True)
class Folding:
    """What folding did to a network.

    Args:
        tolerance: relative root mean square error that the outputs of each layer may have.
        layers: those that were folded.
        whole: names of those that depend on timestep and conditions alone, and stay as they are.
        params: of the network, `before` and `after`.
        output_error: of the network's output on held-out samples, relative to its root mean square.
        covered: ranges of what was recorded.
    """

    tolerance: float
    layers: tuple[FoldedLayer, ...]
    whole: tuple[str, ...]
    params: Mapping[str, int]
    output_error: float
    covered: Mapping[str, Any]

    @property
    def layer_error(self) -> float:
        """The largest of any layer."""
        return max(layer.error for layer in self.layers)

    def document(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {**asdict(self), "layer_error": self.layer_error}
