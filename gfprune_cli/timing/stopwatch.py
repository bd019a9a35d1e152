"""Seconds of layers, and of networks that take turns."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gfprune_cli.evaluation.latency import Stopwatch
from gfprune_cli.progress import Event, Progress
from gfprune_cli.runtime.device import kernels

Call = Callable[[], object]
BURST = 2e-3  # seconds of one reading of a layer, about: many calls where one is short
LONGEST = 1000  # calls of a burst
LAYER_SECONDS = 0.02  # after which no further reading of a layer begins
BURSTS = 4
ROUNDS = 60  # of networks, at most
SECONDS = 3.0  # of one bout of rounds, about
BOUTS = 4  # while the spread is too wide
STEADY = 0.01  # standard error of a ratio of times that is good enough
# standard error of a median over its quartiles' distance, times the root of the count
NORMAL = 1.2533 / 1.349


@dataclass(frozen=True)
class Reading:
    """Median and quartiles."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Reading":
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))

    @property
    def error(self) -> float:
        """Standard error of the median."""
        return NORMAL * (self.high - self.low) / math.sqrt(self.count)

    @property
    def steady(self) -> bool:
        """Whether the median is known to about 1 %."""
        return self.error <= STEADY * self.value

    def in_milliseconds(self) -> "Reading":
        """A reading of seconds in milliseconds."""
        return Reading(1e3 * self.value, 1e3 * self.low, 1e3 * self.high, self.count)


@torch.inference_mode()
def layer_seconds(call: Call, device: torch.device, *, replayed: bool = False) -> float:
    """The fastest of a few bursts: what else the machine does only adds.

    Args:
        replayed: a burst is one CUDA graph, so that no operator is launched by itself.
    """
    watch = Stopwatch(device, 1, SECONDS, lambda: None)

    def seconds_of(burst: Call, count: int) -> float:
        start = watch.now()
        burst()
        return (watch.now() - start) / count

    seconds_of(call, 1)
    found = [seconds_of(call, 1)]
    count = min(LONGEST, math.ceil(BURST / max(found[0], 1e-7)))
    burst: Call = partial(repeat, call, count)
    if replayed:
        burst = graph_of(burst)
    begin = watch.now()
    while len(found) <= BURSTS and watch.now() - begin < LAYER_SECONDS - found[0]:
        found.append(seconds_of(burst, count))
    return min(found)


def repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def graph_of(call: Call) -> Call:
    """What a call launches, as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Call = graph.replay
    return replay


def network_seconds(calls: Sequence[Call], device: torch.device, progress: Progress) -> list[list[float]]:
    """Seconds of each call, in turns; more of them while the ratio to the first is not known to 1 %."""
    pulse = lambda: progress(Event("time"))  # noqa: E731
    watch = Stopwatch(device, ROUNDS, SECONDS, pulse)
    found: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode(), kernels(exact=False):
        for _ in range(BOUTS):
            for times, more in zip(found, watch.measure(calls), strict=True):
                times += more
            if all(times_as_fast(found[0], other).steady for other in found[1:]):
                break
    return found


def times_as_fast(one: Sequence[float], other: Sequence[float]) -> Reading:
    """How many times as fast the other is, turn by turn."""
    return Reading.of([a / b for a, b in zip(one, other, strict=True)])
