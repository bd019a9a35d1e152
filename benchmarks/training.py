"""What finetuning's defaults are worth: each is changed alone, on three networks.

    python benchmarks/training.py
    python benchmarks/training.py --subjects demo --steps 400 --seeds 1

Networks are pruned to a quarter of their parameters and MACs, and finetuned on their training images with
each setting for the same number of steps. Measured on held-out images and on samples from the same noise.
Networks other than the demo are those that `quality.py` trains. Writes docs/benchmarks/training.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import flags
from study import ALL_IMAGES, QUALITY, QUALITY_HEAD, Study, cells, head, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune

SAMPLES, SAMPLE_STEPS = 128, 20
SETTINGS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 3e-3},
    {"learning_rate": 6e-3},
    {"optimizer": "muon"},
    {"optimizer": "adamw"},
    {"timesteps": "stratified"},
    {"features": 0.0},
    {"by_block": True},
]


def measure(place: Place, steps: list[int], seed: int) -> list[list[dict[str, Any]]]:
    """[steps][SETTINGS] the networks that are finetuned from one pruned one."""
    target = place.open()
    yardstick = Yardstick(target, SAMPLES, SAMPLE_STEPS)
    data: dict[str, Any] = dict(data=str(place.data), images=ALL_IMAGES, seed=seed, force=True)
    with tempfile.TemporaryDirectory() as folder:
        pruned, out = Path(folder) / "pruned", Path(folder) / "out"
        gfprune.prune(target.model, sparsity=0.75, recover=0, out=pruned, **data)

        def tuned(count: int, settings: dict[str, Any]) -> dict[str, Any]:
            brief = dict(save_every=0, sample_every=0)
            done = gfprune.finetune(pruned, out=out, steps=count, **brief, **data, **settings)
            return {**yardstick.measure(gfprune.load(out)), "seconds": done.seconds}

        return [[tuned(count, settings) for settings in SETTINGS] for count in steps]


def lines(study: Study) -> Iterator[str]:
    yield "Mean, lowest and highest seed in brackets."
    started = {name: study.start(measure, place, study.own.steps) for name, place in study.subjects.items()}
    for name, waiting in started.items():
        by_seed = waiting()
        for number, steps in enumerate(study.own.steps):
            yield from ("", f"## {name}, {steps} steps", *head("settings", QUALITY_HEAD, "seconds"))
            for row, settings in enumerate(SETTINGS):
                name = f"`{flags(settings)}`" if settings else "defaults"
                runs = [found[number][row] for found in by_seed]
                yield f"| {name} | {cells(runs, {**QUALITY, 'seconds': 0})} |"


if __name__ == "__main__":
    write_study(__file__, str(__doc__), "Settings of a training step", lines, steps=[400])
