"""How the core reports what it is doing: events to a callback. Only `gfprune_cli.cli` prints them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Args:
        phase: what the run is doing ("load", "trace", "encode", "calibrate", "score", "train", "mask",
            "evaluate", "probe", "remove", "finetune", "sample", "features", "loss", "latency", "export",
            "verify", "write"), or "notice" for a sentence that the user should read.
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


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """The callback that reports nothing."""


def notice(report: Report, text: str) -> None:
    """Tell the user one thing they should know, without stopping."""
    report(Event("notice", text=text))
