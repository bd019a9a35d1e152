"""The arithmetic of `quality.py`: gaps to the dense network, the best peer's, and gfprune's goals."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grid import FINETUNED, Entry

OURS = "gfprune"
# metric -> what separates a network from its dense original, 0 for nothing
GAPS: dict[str, Callable[[Entry, Entry], float]] = {
    "loss": lambda entry, dense: entry["loss"] - dense["loss"],
    "ssim": lambda entry, dense: 1 - entry["ssim"],
    "fd_teacher": lambda entry, dense: entry["fd_teacher"],
}
LOSS_GOALS = {3200: 0.35, 16_000: 0.5, 64_000: 0.6}
GOALS: dict[str, Callable[[int], float | None]] = {
    "loss": LOSS_GOALS.get,
    "ssim": lambda gradients: 0.5,
    "fd_teacher": lambda gradients: 0.2,
}
Rows = dict[str, list[Entry]]


def rows_of(entries: Sequence[Entry], subject: str, sparsity: float, gradients: int) -> Rows:
    """Method -> its runs, one per seed."""
    rows: Rows = {}
    for entry in entries:
        if (entry["subject"], entry["sparsity"], entry["gradients"]) == (subject, sparsity, gradients):
            rows.setdefault(entry["method"], []).append(entry)
    return rows


def not_finetuned(rows: Rows) -> Rows:
    """Without the peers that gfprune's own trainer has trained with its defaults."""
    return {method: runs for method, runs in rows.items() if not method.endswith(FINETUNED)}


def if_finetuned(rows: Rows) -> Rows:
    """All of them where peers have been finetuned, else none."""
    return rows if any(name.endswith(FINETUNED) for name in rows) else Rows()


def dense_of(entries: Sequence[Entry], subject: str) -> Entry | None:
    return next(iter(rows_of(entries, subject, 0.0, 0).get("dense", [])), None)


def gap(runs: Sequence[Entry], dense: Entry, metric: str) -> float:
    """Mean over the seeds."""
    return statistics.mean(GAPS[metric](run, dense) for run in runs)


def best_peer(rows: Rows, dense: Entry, metric: str) -> str | None:
    """The row that leaves the least gap, of all that are not gfprune's: published or tuned."""
    peers = [name for name in rows if name != OURS]
    return min(peers, key=lambda name: gap(rows[name], dense, metric), default=None)


def share(ours: float, theirs: float) -> float:
    """Of a gap; against a peer that leaves none, a gap is infinitely larger or not there either."""
    if theirs > 0:
        return ours / theirs
    return 0.0 if ours <= theirs else math.inf


@dataclass(frozen=True)
class Verdict:
    """gfprune's gap as a share of the best peer's.

    Args:
        peer: the best peer's row.
        mean: ratio of the means over the seeds.
        seeds: of each of gfprune's seeds; against the same seed of the peer, or its mean where that is not
            there.
        goal: the largest share that counts as a pass; None: there is no goal at this length.
    """

    peer: str
    mean: float
    seeds: tuple[float, ...]
    goal: float | None

    @property
    def passed(self) -> bool | None:
        return None if self.goal is None else self.mean <= self.goal


def verdict(rows: Rows, dense: Entry, metric: str, gradients: int) -> Verdict | None:
    """None if gfprune, or every peer, has yet to run."""
    peer = best_peer(rows, dense, metric)
    if peer is None or OURS not in rows:
        return None
    theirs = {run["seed"]: GAPS[metric](run, dense) for run in rows[peer]}
    mean = statistics.mean(theirs.values())
    seeds = tuple(share(GAPS[metric](run, dense), theirs.get(run["seed"], mean)) for run in rows[OURS])
    return Verdict(peer, share(gap(rows[OURS], dense, metric), mean), seeds, GOALS[metric](gradients))
