"""How the core reports what it is doing: events to a callback. Only `gfprune_cli.cli` prints them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gfprune_cli.errors import in_words_of_the_caller


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Args:
        phase: what the run is doing ("load", "trace", "encode", "calibrate", "fold", "score", "mask",
            "refit", "refitted", "evaluate", "probe", "remove", "finetune", "sample", "features", "loss",
            "latency", "time", "export", "verify", "write"), or "notice" for a sentence that the user should
            read.
        step: how many of `total` are done.
        total: 0 when not countable.
        text: one line, for people.
        values: numbers that belong to the step, by name (loss, sparsity, ...).
    """

    phase: str
    step: int = 0
    total: int = 0
    text: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The callback that reports nothing."""


PHASES = {
    "load": "loading",
    "trace": "loading",
    "encode": "calibration",
    "calibrate": "calibration",
    "fold": "folding",
    "time": "timing",
    "check": "check",
    "evaluate": "evaluation",
    "score": "scoring",
    "mask": "scoring",
    "refit": "refit",
    "refitted": "refit",
    "finetune": "recovery",
    "remove": "removal",
    "sample": "samples",
    "write": "writing",
}
# events that say what has been done; the others say what begins
AT_THE_END = ("mask", "refitted", "finetune")


class PhaseClock:
    """A callback that hands events on and adds up the seconds between them, by the name of their phase.

    Args:
        report: where events go.
        clock: seconds, monotonic.
    """

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress, self.clock = progress, clock
        self.seconds: dict[str, float] = {}
        self.phase, self.last = PHASES["load"], clock()

    def __call__(self, event: Event) -> None:
        name = PHASES.get(event.phase, self.phase)
        self.add(name if event.phase in AT_THE_END else self.phase)
        self.phase = name
        self.progress(event)

    def add(self, name: str) -> None:
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def finish(self) -> dict[str, float]:
        """Seconds by phase up to now, in the order in which the phases came."""
        self.add(self.phase)
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


def notice(progress: Progress, text: str) -> None:
    """Tell the user one thing they should know, without stopping."""
    progress(Event("notice", text=in_words_of_the_caller(text)))
