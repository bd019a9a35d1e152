"""The closed loop: build what the table proposes, time it, correct what is asked of the table.

A table predicts the time of a network it never saw; HALP and LayerMerge stop there and miss by 8 to 26 %.
Two networks whose times are known lie on a line (the dense one is the first), and the next proposal is where
the line meets the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfprune_cli.timing.stopwatch import Reading

CORRECTIONS = 3
CLOSE = 0.015  # of the target: near enough
SLOPES = 0.5, 2.0  # of measured over predicted savings, that are believed
FURTHEST = 0.6  # of the share that was predicted last: a correction goes no further
Kept = Mapping[str, int]


@dataclass(frozen=True)
class Trial:
    """One network that was built and timed; shares are of the dense network's time.

    Args:
        asked: of the table.
        predicted: by the table.
        speedup: measured.
        ms: milliseconds of the dense network, and of this one.
    """

    asked: float
    predicted: float
    speedup: Reading
    ms: tuple[float, float]

    @property
    def measured(self) -> float:
        return 1 / self.speedup.value

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> "Trial":
        return cls(**{**found, "speedup": Reading(**found["speedup"]), "ms": tuple(found["ms"])})


def close(
    target: float,
    propose: Callable[[float], tuple[Kept, float] | None],
    time: Callable[[Kept], tuple[Reading, tuple[float, float]]],
) -> tuple[Kept, list[Trial], Trial]:
    """Widths whose measured time is the target.

    Args:
        target: share of the dense time that may stay.
        propose: share -> (widths that the table gives it, the share it predicts); None where there are none.
        time: widths -> (how many times as fast, milliseconds of both networks).

    Returns:
        (widths nearest to the target, every trial, the one that they come from).
    """
    trials: list[tuple[Kept, Trial]] = []
    asked = target
    for _ in range(1 + CORRECTIONS):
        proposal = propose(asked)
        if proposal is None:
            break
        kept, predicted = proposal
        if any(kept == before for before, _ in trials):
            break
        trials.append((kept, Trial(asked, predicted, *time(kept))))
        if abs(trials[-1][1].measured / target - 1) <= CLOSE:
            break
        asked = corrected(target, [trial for _, trial in trials])
    kept, best = min(trials, key=lambda pair: abs(pair[1].measured / target - 1))
    return kept, [trial for _, trial in trials], best


def corrected(target: float, trials: list[Trial]) -> float:
    """The share to ask for next: where the line through the last two networks meets the target."""
    last = trials[-1]
    low, high = SLOPES
    slopes = [(1 - last.measured) / max(1 - last.predicted, 1e-9)]
    if len(trials) > 1 and trials[-2].predicted != last.predicted:
        before = trials[-2]
        slopes.insert(0, (before.measured - last.measured) / (before.predicted - last.predicted))
    slope = next((slope for slope in slopes if low <= slope <= high), 1.0)
    wanted = last.predicted + (target - last.measured) / slope
    return min(1 - 1e-6, max(FURTHEST * last.predicted, wanted))
