"""The second half of a prune run's state: the narrow network in recovery, and what was found before it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch

from gfprune_cli.flow.loop import RefitResult
from gfprune_cli.outputs.state import StateFolder, as_families, by_family

PHASE = "recovery"


@dataclass
class Outcome:
    """What a run has found so far, in the order in which it comes.

    Args:
        kept: group name -> bool [units].
        losses: `before`, `masked`, `removed`, `recovered`, as far as they were taken.
        gradients: spent on scoring and refits, in gradients of one sample.
        limit: how the loss decided about the sparsity, if it did.
    """

    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    refits: list[RefitResult] = field(default_factory=list)
    gradients: float = 0.0
    limit: dict[str, Any] | None = None


class RecoveryState:
    """A part of a run's state, as recovery sees it: its own tensors and numbers, beside those of the run.

    Args:
        state: of the whole run.
    """

    def __init__(self, state: StateFolder) -> None:
        self.state = state
        self.found: Outcome | None = None
        self.settings: dict[str, Any] = {}

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The state that a run left that was stopped in its recovery."""
        saved = self.state.load()
        return saved if saved is not None and saved[1].get("phase") == PHASE else None

    def begun(self) -> bool:
        """Whether the state that a stopped run left is of its recovery."""
        return self.saved() is not None

    def outcome(self) -> Outcome:
        """What the run had found before it was stopped in its recovery."""
        saved = self.saved()
        assert saved is not None
        tensors, numbers = saved
        kept = by_family(tensors)["kept"]
        refits = [RefitResult(**refit) for refit in numbers["refits"]]
        return Outcome(kept, numbers["losses"], refits, numbers["gradients"], numbers["limit"])

    def trained_with(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What recovery does differently because memory is short: as it began, whatever is free by now."""
        saved = self.saved()
        self.settings = dict(settings if saved is None else saved[1].get("settings", {}))
        return self.settings

    def of(self, outcome: Outcome) -> Self:
        """The same, for a run that has found this."""
        self.found = outcome
        return self

    def begin(self) -> None:
        self.state.begin()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of the recovery; None before its first save."""
        saved = self.saved()
        if saved is None:
            return None
        tensors, numbers = saved
        return by_family(tensors).get("own", {}), numbers["recovery"]

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        assert self.found is not None
        self.state.save(
            as_families(own=tensors, kept=self.found.kept),
            {
                "phase": PHASE,
                "recovery": dict(numbers),
                "settings": self.settings,
                "losses": self.found.losses,
                "refits": [asdict(refit) for refit in self.found.refits],
                "gradients": self.found.gradients,
                "limit": self.found.limit,
            },
        )
