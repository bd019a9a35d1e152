"""A budget of time: what was asked for, against the measured or given times of the network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gfprune_cli.errors import UsageError
from gfprune_cli.families.family import Sizes
from gfprune_cli.progress import Progress, notice
from gfprune_cli.recipes.analyze import AnalyzeRecipe
from gfprune_cli.recipes.options import parsed_size
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.device import Precision, default_precision
from gfprune_cli.structure.budget import OutOfTime, allocate
from gfprune_cli.structure.cost import TIME, CostModel
from gfprune_cli.structure.search import Allocation
from gfprune_cli.timing.closed_loop import Trial, close
from gfprune_cli.timing.kinds import layers_run
from gfprune_cli.timing.measure import network_digest, time_table
from gfprune_cli.timing.runtimes import Bench
from gfprune_cli.timing.stopwatch import Reading, times_as_fast
from gfprune_cli.timing.table import TimeTable, read_table, table_of
from gfprune_cli.timing.whole import whole_networks

MISSED = 0.03  # of the target: a run that ends so far from it says so
NEAR = 1.25  # times the speed asked for: where the table says the limit is nearer, it is measured
Scores = Mapping[str, torch.Tensor]


def bench_of(options: AnalyzeRecipe | PruneRecipe, device: torch.device) -> Bench:
    """Where the options ask to time.

    Raises:
        UsageError: the size is none.
    """
    precision: Precision = options.precision or default_precision(device)
    sizes = Sizes()
    if options.time_size is not None:
        height, width = parsed_size("--time-size", options.time_size)
        sizes = Sizes(height=height, width=width)
    return Bench(options.runtime, device, precision, options.time_batch, sizes)


@dataclass(eq=False)
class TimeBudget:
    """The times of one network, and what is asked of them.

    Args:
        network: the dense one, its structure.
        bench: where it is timed; None where the table came from a file, and nothing can be.
        left: share of the dense time that may stay.
        asked: {"speedup": times as fast} or {"latency": milliseconds}.
        trials, chosen: what was built and timed, and which of them is the network.
    """

    network: nn.Module
    table: TimeTable
    bench: Bench | None
    left: float = 1.0
    asked: Mapping[str, float] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    chosen: Trial | None = None

    @property
    def gone(self) -> float:
        """Share of the dense time that has to go."""
        return 1 - self.left

    def attach(self, cost: CostModel, network: nn.Module) -> None:
        """Make time a cost of the cost model of the network, or of what it was folded to."""
        bench = self.bench or bench_at(self.table)
        self.table.attach(cost, layers_run(network, bench.inputs(network)))

    def asking(self, *, speedup: float | None, latency: float | None) -> "TimeBudget":
        """The budget with what is asked for.

        Raises:
            UsageError: the dense network is that fast.
        """
        if speedup is not None:
            return replace(self, left=1 / speedup, asked={"speedup": speedup})
        assert latency is not None
        dense = self.table.ms[0]
        if latency >= dense:
            where = self.table.where
            raise UsageError(
                f"--latency {latency:g}: the network as it is takes {dense:.3g} ms in {where.get('runtime')} "
                f"on {where.get('device')}, batch {where.get('batch')}: ask for less"
            )
        return replace(self, left=latency / dense, asked={"latency": latency})

    @cached_property
    def flag(self) -> str:
        return " ".join(f"--{name} {value:g}" for name, value in self.asked.items())

    def widths(
        self,
        cost: CostModel,
        scores: Scores,
        sparsity: float,
        *,
        share: float = 1.0,
        left: float | None = None,
        **how: Any,
    ) -> Allocation:
        """`allocate` for a share of this budget, and of the sparsity; `how` as there.

        Args:
            left: share of the time to ask for in the place of the budget's.

        Raises:
            OutOfTime: the speed is out of reach; says how fast the network can be, and what holds it back.
            UsageError: the sparsity is.
        """
        gone = self.gone if left is None else 1 - left
        try:
            return allocate(cost, scores, sparsity * share, time=gone * share, **how)
        except OutOfTime as error:
            if error.nearest.sparsities[TIME] >= gone * share:
                raise UsageError(str(error)) from None
            least = narrowest(cost, scores)
            time = cost.total(least, TIME) / cost.before(TIME)
            said = self.out_of_reach(cost, least, 1 / time, self.table.ms[0] * time)
            raise OutOfTime(error.nearest, said) from None

    def out_of_reach(self, cost: CostModel, least: Mapping[str, int], speedup: float, ms: float) -> str:
        """What to say of a network that cannot be that fast.

        Args:
            least: its narrowest widths.
            speedup, ms: at these.
        """
        time = cost.total(least, TIME)
        removed = cost.removed(least)
        alive = np.array([n for n, layer in enumerate(cost.layers) if not layer.gone(removed)], np.int64)
        assert cost.times is not None
        launching = min(1.0, cost.times.launching(alive) / time)
        where, blocks = self.table.where, any(group.is_block for group in cost.groups.values())
        advice = [
            *(["--runtime compile"] if where.get("runtime") == "eager" else []),
            "a larger --time-batch",
            *([] if blocks else ["--blocks"]),
        ]
        return (
            f"{self.flag} cannot be reached: at its narrowest the network is {speedup:.3g} times as "
            f"fast, {ms:.3g} ms, and {launching:.0%} of that is launching "
            f"operators: try {', '.join(advice[:-1])}{' or ' if advice[:-1] else ''}{advice[-1]}"
        )

    def check_reach(self, cost: CostModel, scores: Scores, progress: Progress) -> None:
        """Time the network at its narrowest, where the table says that what is asked for is nearly that.

        Raises:
            UsageError: it is slower, and not by the spread.
        """
        least = narrowest(cost, scores)
        if self.bench is None or cost.total(least, TIME) / cost.before(TIME) * NEAR < self.left:
            return
        with whole_networks(cost, self.bench, progress, self.network) as seconds:
            dense, narrow = seconds([least])
        found = times_as_fast(dense, narrow)
        if (found.value + 2 * found.error) * (1 + MISSED) * self.left < 1:
            ms = Reading.of(narrow).in_milliseconds().value
            raise UsageError(self.out_of_reach(cost, least, found.value, ms))

    def closed(
        self,
        cost: CostModel,
        propose: Any,
        progress: Progress,
        network: nn.Module | None = None,
    ) -> Mapping[str, int]:
        """Widths that are as fast as was asked, measured; `trials` and `chosen` say how fast.

        Args:
            propose: share of the dense time that may stay -> widths; None where there are none.
            network: see `whole_networks`.
        """
        assert self.bench is not None
        if self.chosen is not None:  # a run that goes on: it was measured then
            kept: Mapping[str, int] = propose(self.chosen.asked)
            return kept

        def proposal(left: float) -> tuple[Mapping[str, int], float] | None:
            found = propose(left)
            return None if found is None else (found, cost.total(found, TIME) / cost.before(TIME))

        with whole_networks(cost, self.bench, progress, self.network, network) as seconds:

            def timed(found: Mapping[str, int]) -> tuple[Reading, tuple[float, float]]:
                dense, narrow = seconds([found])
                both = Reading.of(dense).in_milliseconds(), Reading.of(narrow).in_milliseconds()
                return times_as_fast(dense, narrow), (both[0].value, both[1].value)

            kept, self.trials, self.chosen = close(self.left, proposal, timed)
        missed = self.chosen.measured / self.left - 1
        if abs(missed) > MISSED:
            notice(
                progress,
                f"{self.flag}: the nearest of the networks that were timed takes {missed:+.1%} of the time "
                "that was asked for",
            )
        if not self.chosen.speedup.steady:
            notice(
                progress,
                "the machine is busy: times vary by more than 1 %, and so may the speed that is said",
            )
        return kept

    def document(self, cost: CostModel, kept: Mapping[str, int]) -> dict[str, Any]:
        """What was asked, predicted and measured, for a record."""
        predicted = cost.before(TIME) / cost.total(kept, TIME)
        where, dense = self.table.where, self.table.ms
        best = self.chosen
        return {
            **{
                name: where.get(name)
                for name in ("runtime", "device", "precision", "batch", "size", "threads")
            },
            "asked": dict(self.asked),
            "predicted": {"speedup": predicted, "ms": dense[0] / predicted},
            "dense": {"ms": dense[0], "low": dense[1], "high": dense[2], "steady": self.table.steady},
            "measured": None
            if best is None
            else {
                "speedup": best.speedup.value,
                "low": best.speedup.low,
                "high": best.speedup.high,
                "turns": best.speedup.count,
                "steady": best.speedup.steady,
                "ms": best.ms[1],
                "ms_dense": best.ms[0],
            },
            "trials": [
                {"asked": 1 / one.asked, "predicted": 1 / one.predicted, "measured": one.speedup.value}
                for one in self.trials
            ],
        }

    def facts(self) -> dict[str, Any]:
        """What a run that goes on must not measure again."""
        return {
            "table": self.table.document(),
            "trials": [trial.document() for trial in self.trials],
            "chosen": None if self.chosen is None else self.trials.index(self.chosen),
        }


def narrowest(cost: CostModel, scores: Scores) -> Mapping[str, int]:
    """Widths of the fastest network."""
    return allocate(cost, scores, 0, time=1 - 1e-6, strict=False).kept


def bench_at(table: TimeTable) -> Bench:
    """Sizes of a table that was measured elsewhere: what runs can be seen on any device."""
    size = table.where.get("size") or [None, None]
    batch = table.where.get("batch")
    if not (isinstance(batch, int) and 0 < batch <= 1 << 16) or not isinstance(size, list) or len(size) != 2:
        raise UsageError("--times: the table does not say its batch and size: write it with --times-out")
    sizes = Sizes(height=size[0], width=size[1])
    return Bench("eager", torch.device("cpu"), "fp32", batch, sizes)


def time_budget(
    options: AnalyzeRecipe | PruneRecipe,
    network: nn.Module,
    cost: CostModel,
    device: torch.device,
    progress: Progress,
    facts: Mapping[str, Any] | None = None,
) -> TimeBudget:
    """The times of a network: from a file, from the run that is continued, from the cache, or measured now.

    Args:
        network: its structure; time becomes a cost of `cost`.
        facts: of an interrupted run.

    Raises:
        UsageError: they are of another network, or cannot be measured here.
    """
    if options.times is not None:
        table = read_table(Path(options.times).expanduser())
        if table.network != network_digest(network):
            raise UsageError(
                f"--times {options.times} was measured for another network than --model: write a table for "
                "this one with gfprune analyze --times-out"
            )
        found = TimeBudget(network, table, None)
    else:
        bench = bench_of(options, device)
        if facts:
            trials = [Trial.from_document(trial) for trial in facts["trials"]]
            chosen = None if facts["chosen"] is None else trials[facts["chosen"]]
            table = table_of(facts["table"], "the table in the state")
            found = TimeBudget(network, table, bench, trials=trials, chosen=chosen)
        else:
            found = TimeBudget(network, time_table(network, cost, bench, progress), bench)
    found.attach(cost, network)
    return found
