"""As small as the loss allows: the sparsity at which the held-out loss reaches a limit.

Every trial starts from the last network that keeps the limit, and goes on to a higher sparsity; one that
breaks the limit is taken back. So the network that is left has come by the same kind of flow as one whose
sparsity was given.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gfprune_cli.errors import UsageError
from gfprune_cli.flow.loop import PruningLoop, RefitResult, Scoring
from gfprune_cli.flow.mask import Masks
from gfprune_cli.outputs.state import StateFolder, as_families, by_family
from gfprune_cli.progress import Event
from gfprune_cli.pruning.flows import Flow, Kept
from gfprune_cli.pruning.plan import uniform_scores
from gfprune_cli.recipes.prune import MOST
from gfprune_cli.runtime.device import weights_of
from gfprune_cli.structure.cost import TIME
from gfprune_cli.structure.search import TOLERANCE

FIRST = 0.5  # of the way to the most that may go, where nobody said how much that is
INSIDE = 0.15  # of an interval: how near its ends a trial may be
LEAST_RISE = 1e-3  # of the dense loss: what is smaller says nothing of the next trial
EXPONENT = 2.0  # by which the rise grows with the sparsity, where one network says how high it is
PHASE = "trials"


@dataclass(frozen=True)
class Trial:
    """One network on the way.

    Args:
        ratio: its held-out loss, of the dense network's; `spread` is the standard error.
        keeps: whether that is within the limit.
    """

    sparsity: float
    ratio: float
    spread: float
    keeps: bool


@dataclass
class LossLimit:
    """Takes a flow to the highest sparsity whose held-out loss keeps a limit.

    The loss is that of the masked network, after its refit, over all noisy samples of the reported losses:
    of images that neither scoring nor refit sees.

    Args:
        limit: times the loss of the dense network.
    """

    flow: Flow
    state: StateFolder
    limit: float
    trials: list[Trial] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # weights of the last network that keeps it
    masks: Masks = field(default_factory=dict)
    refits: list[RefitResult] = field(default_factory=list)
    scored: Scoring | None = None

    def run(self) -> tuple[Kept, dict[str, Any]]:
        """(what is kept, how the loss decided).

        Raises:
            UsageError: no network keeps the limit.
        """
        self.restore()
        most = self.most()
        dense = self.flow.losses(self.flow.dense)
        while (target := self.next_target(most)) is not None:
            store = TrialState(self)
            store.loop = loop = self.flow.loop(target, store, self.scored)
            self.flow.run(loop, target)
            self.scored = loop.scored
            self.judge(target, dense)
        if self.last_kept() is None:
            nearest = self.trials[-1]
            raise UsageError(
                f"--keep-loss {self.limit:g} cannot be kept: with {nearest.sparsity:.1%} of "
                f"{self.of} gone the loss is {nearest.ratio:.3f} times that of the dense "
                "network; allow more"
            )
        return self.put_back(), self.document(most)

    def most(self) -> float:
        """The most that may go: what was asked for, or the nearest to it that widths can reach."""
        plan, recipe = self.flow.job.plan, self.flow.job.recipe
        if plan.time is not None:
            return plan.most(recipe)
        return min(recipe.goal, plan.allocate(uniform_scores(plan.groups), recipe, strict=False).sparsity)

    @property
    def of(self) -> str:
        """What the sparsities of trials are shares of."""
        return self.flow.job.recipe.budget if self.flow.job.plan.time is None else TIME

    def last_kept(self) -> Trial | None:
        """The last network that keeps the limit; None while that is the dense one."""
        return next((trial for trial in reversed(self.trials) if trial.keeps), None)

    def next_target(self, most: float) -> float | None:
        """The sparsity to try next; None where the answer is known to a point.

        What broke the limit counts only until a network is kept: from there the way up is a shorter one.
        """
        kept = [number for number, trial in enumerate(self.trials) if trial.keeps]
        below = self.last_kept()
        low = 0.0 if below is None else below.sparsity
        broke = self.trials[kept[-1] + 1 :] if kept else self.trials
        before = self.trials[kept[-2] + 1 if len(kept) > 1 else 0 : kept[-1]] if kept else []
        if low >= most or any(trial.sparsity - low <= TOLERANCE for trial in (*before, *broke)):
            return None
        if broke:
            above = broke[-1]
            width = above.sparsity - low
            guess = crossing(below, above, self.limit)
            return round(min(max(guess, low + INSIDE * width), above.sparsity - INSIDE * width), 4)
        if below is None:
            return FIRST * most if self.flow.job.recipe.goal == MOST else most
        guess = min(max(crossing(below, None, self.limit), low + TOLERANCE), (1 + low) / 2)
        return most if most - guess <= TOLERANCE else round(guess, 4)

    def judge(self, target: float, dense: torch.Tensor) -> None:
        """Keep the network, or take it back."""
        ratio, spread = ratio_of(self.flow.losses(self.flow.masked), dense)
        trial = Trial(target, ratio, spread, ratio <= self.limit)
        self.trials.append(trial)
        if trial.keeps:
            self.scored = None  # the next one is scored anew
            self.refits = self.flow.refits
            self.kept = {name: tensor.detach().clone() for name, tensor in self.flow.masked.weights.items()}
            self.masks = dict(self.flow.masked.masks)
        else:
            self.put_back()
            if (time := self.flow.job.plan.time) is not None:
                time.trials, time.chosen = [], None  # what was timed is no more
        self.state.save(*self.saved({}, None))
        self.flow.job.progress(Event("limit", text=told(trial, self.limit)))

    def put_back(self) -> Kept:
        """Give the flow the last network that keeps the limit; the dense one, if there is none."""
        flow, last = self.flow, self.last_kept()
        weights = self.kept or weights_of(flow.dense)
        with torch.no_grad():
            for name, weight in flow.masked.weights.items():
                weight.copy_(weights[name])
        flow.masked.set_masks(
            self.masks or {name: torch.ones_like(mask) for name, mask in flow.masked.masks.items()}
        )
        flow.sparsity, flow.refits = 0.0 if last is None else last.sparsity, self.refits
        flow.drawn = sum(trial.keeps for trial in self.trials) * flow.iterations
        return {name: mask == 1 for name, mask in flow.masked.masks.items()}

    def document(self, most: float) -> dict[str, Any]:
        """What the record says."""
        last = self.last_kept()
        assert last is not None
        return {
            "limit": self.limit,
            "of": self.of,
            "loss": last.ratio,
            "spread": last.spread,
            "stopped_by": "loss" if last.sparsity < most else "budget",
            "most": most,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def saved(
        self, tensors: Mapping[str, torch.Tensor], loop: Mapping[str, Any] | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, numbers) of the state: the last network that keeps the limit, and the loop on its way."""
        scored = self.scored
        known = {} if scored is None else {"scores": scored.scores, "compared": scored.compared}
        found = as_families(loop=tensors, kept=self.kept, masks=self.masks, **known)
        return found, {
            "phase": PHASE,
            "trials": [asdict(trial) for trial in self.trials],
            "loop": None if loop is None else dict(loop),
            "refits": [asdict(refit) for refit in self.refits],
            "gradients": self.flow.gradients,
            "way": None if scored is None else scored.way,
        }

    def restore(self) -> None:
        saved = self.state.load()
        if saved is None:
            return
        tensors, numbers = saved
        families = by_family(tensors)
        self.trials = [Trial(**trial) for trial in numbers["trials"]]
        self.kept, self.masks = families.get("kept", {}), families.get("masks", {})
        self.refits = [RefitResult(**refit) for refit in numbers["refits"]]
        if "scores" in families:
            self.scored = Scoring(families["scores"], families["compared"], numbers["way"], 0.0)
        self.flow.gradients = numbers["gradients"]
        self.put_back()


@dataclass
class TrialState:
    """A part of the state, as the loop of one trial sees it."""

    search: LossLimit
    loop: PruningLoop | None = None

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        saved = self.search.state.load()
        if saved is None or saved[1]["loop"] is None:
            return None
        tensors, numbers = saved
        return by_family(tensors)["loop"], numbers["loop"]

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        assert self.loop is not None
        self.search.scored = self.loop.scored
        self.search.state.save(*self.search.saved(tensors, numbers))


def crossing(below: Trial | None, above: Trial | None, limit: float) -> float:
    """Where the rise of the loss may reach the limit, from what was found on both sides of it, or on one.

    Along the way the rise is taken to grow with a power of the sparsity: the one that joins both sides, or
    the second.
    """
    known = [trial for trial in (below, above) if trial is not None and math.isfinite(trial.ratio)]
    if not known:
        return 0.0
    points = [(math.log(max(trial.ratio - 1, LEAST_RISE)), math.log(trial.sparsity)) for trial in known]
    (rise, at), (last_rise, last) = points[0], points[-1]
    slope = (last - at) / (last_rise - rise) if last_rise > rise else 1 / EXPONENT
    return math.exp(at + slope * (math.log(max(limit - 1, LEAST_RISE)) - rise))


def ratio_of(losses: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """(ratio of the means, its standard error) of losses [N] of the same draws.

    The error is that of a ratio estimator: the spread of what the draws differ from one line through 0.
    """
    ratio = float(losses.mean() / dense.mean())
    count = len(losses)
    residual = (losses - ratio * dense).square().sum() / (count * (count - 1))
    return ratio, float(residual.sqrt() / dense.mean())


def told(trial: Trial, limit: float) -> str:
    """One line about a trial."""
    kept = f"keeps {limit:g}" if trial.keeps else f"is above {limit:g}"
    return f"sparsity {trial.sparsity:.3f}: {trial.ratio:.3f} +- {trial.spread:.3f} of the dense loss, {kept}"
