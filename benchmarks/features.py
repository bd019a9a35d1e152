"""Does recovery gain by comparing features of the kept channels, and up to which length?

    python benchmarks/features.py
    python benchmarks/features.py --subjects demo --steps 50 --seeds 1

Networks are pruned to half of their parameters and MACs, and trained by `prune --recover` with the term and
without. Measured on held-out images and on samples from the same noise. Networks other than the demo are
those that `quality.py` trains. Writes docs/benchmarks/features.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import ALL_IMAGES, QUALITY, QUALITY_HEAD, Study, cells, head, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune
from gfprune_cli.pruning import networks

SAMPLES, SAMPLE_STEPS = 128, 20


def measure(place: Place, steps: int, weight: float, seed: int) -> dict[str, Any]:
    """The network that one run writes, and the seconds of its recovery."""
    networks.FEATURES = weight
    target = place.open()
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = dict(data=str(place.data), images=ALL_IMAGES)
        out = Path(folder) / "out"
        done = gfprune.prune(target.model, sparsity=0.5, recover=steps, seed=seed, out=out, **data)
        found = Yardstick(target, SAMPLES, SAMPLE_STEPS).measure(gfprune.load(out))
    return {**found, "seconds": done.seconds_by_phase["recovery"]}


def lines(study: Study) -> Iterator[str]:
    yield "Mean, lowest and highest seed in brackets; seconds of the recovery alone."
    runs = {
        (name, steps): {weight: study.start(measure, place, steps, weight) for weight in study.own.weights}
        for steps in study.own.steps
        for name, place in study.subjects.items()
    }
    for (name, steps), by_weight in runs.items():
        yield from ("", f"## {name}, {steps} steps", *head("weight", QUALITY_HEAD, "seconds"))
        for weight, started in by_weight.items():
            yield f"| {weight:g} | {cells(started(), {**QUALITY, 'seconds': 0})} |"


if __name__ == "__main__":
    title = "Features in recovery"
    write_study(__file__, str(__doc__), title, lines, steps=[50, 400], weights=[0.0, 0.1])
