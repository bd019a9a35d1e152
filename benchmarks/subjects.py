"""The dense networks of `quality.py`: the demo, two that are trained here, and what a user brings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_demo import arguments as training_arguments
from train_demo import train as train_dense
from yardstick import Subject, subject

from gfprune_cli.checkpoint.source import DEMO

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Training:
    """A network to be trained by `train_demo.py`: its images, and options other than the demo's."""

    data: Path
    options: dict[str, Any]


TRAININGS = {
    # of the demo's kind, with other widths and other images
    "second": Training(
        DATA / "noto-objects-32.npz",
        dict(categories=("Objects", "Travel & Places"), widths=(24, 40, 64, 96), lr=1.5e-3),
    ),
    # of another kind: v prediction, cosine schedule, grey 16 x 16, three stages of one width, 16 norm groups
    "third": Training(
        DATA / "noto-people-16.npz",
        dict(
            categories=("People & Body", "Activities"),
            widths=(64, 64, 64),
            groups=16,
            attention=4,
            prediction="v_prediction",
            schedule="squaredcos_cap_v2",
            batch=16,
            lr=1.5e-3,
        ),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a subject lies: a checkpoint, and an .npz file with `x` and `held_out`."""

    name: str
    model: str
    data: Path

    def open(self) -> Subject:
        return subject(self.name, self.model, self.data)


def places_of(work: Path) -> dict[str, Place]:
    """The benchmark's own subjects, by name."""
    trained = {name: Place(name, str(work / name), work / name / "images.npz") for name in TRAININGS}
    return {"demo": Place("demo", "demo", DEMO / "images.npz")} | trained


def is_trained(place: Place, steps: int) -> bool:
    record = Path(place.model) / "training.json"
    return record.exists() and bool(json.loads(record.read_text())["steps"] >= steps)


def train_network(place: Place, steps: int) -> None:
    """Train one of the benchmark's networks, unless it is there."""
    if is_trained(place, steps):
        return
    training = TRAININGS[place.name]
    options = training_arguments().parse_args(
        ["--data", str(training.data), "--out", place.model, "--steps", str(steps), "--device", "cpu"]
    )
    vars(options).update(training.options)
    train_dense(options)
