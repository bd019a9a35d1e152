"""The second half of a prune run's state: the narrow network in recovery, and what was found before it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from gfprune_cli.checkpoint.state import StateFolder
from gfprune_cli.flow.loop import RefitResult

if TYPE_CHECKING:
    from gfprune_cli.pruning.run import Outcome

PHASE = "recovery"


class RecoveryState:
    """A part of a run's state, as recovery sees it: its own tensors and numbers, beside those of the run.

    Args:
        state: of the whole run.
    """

    def __init__(self, state: StateFolder) -> None:
        self.state = state
        self.found: Outcome | None = None

    def begun(self) -> bool:
        """Whether the state that a stopped run left is of its recovery."""
        saved = self.state.load() if self.state.exists() else None
        return saved is not None and saved[1].get("phase") == PHASE

    def outcome(self) -> "Outcome":
        """What the run had found before it was stopped in its recovery."""
        from gfprune_cli.pruning.run import Outcome

        saved = self.state.load()
        assert saved is not None
        tensors, numbers = saved
        kept = {key.partition("/")[2]: units for key, units in tensors.items() if key.startswith("kept/")}
        refits = [RefitResult(**refit) for refit in numbers["refits"]]
        return Outcome(kept, numbers["losses"], refits, numbers["gradients"])

    def of(self, outcome: "Outcome") -> "RecoveryState":
        """The same, for a run that has found this."""
        self.found = outcome
        return self

    def begin(self) -> None:
        self.state.begin()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of the recovery; None before its first save."""
        if not self.begun():
            return None
        saved = self.state.load()
        assert saved is not None
        tensors, numbers = saved
        own = {key: tensor for key, tensor in tensors.items() if not key.startswith("kept/")}
        return own, numbers["recovery"]

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        assert self.found is not None
        kept = {f"kept/{name}": units for name, units in self.found.kept.items()}
        self.state.save(
            {**tensors, **kept},
            {
                "phase": PHASE,
                "recovery": dict(numbers),
                "losses": self.found.losses,
                "refits": [asdict(refit) for refit in self.found.refits],
                "gradients": self.found.gradients,
            },
        )
