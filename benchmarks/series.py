"""Several sparsities from one flow, beside one run for each: are the networks as good, and what do they cost?

    python benchmarks/series.py
    python benchmarks/series.py --subjects demo --seeds 1

`--recover 0`, so that flows are compared and no training. Losses are taken on held-out images. Seconds are
processor time on one thread; those of single runs are added up. Networks other than the demo are those that
`quality.py` trains. Writes docs/benchmarks/series.md.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import ALL_IMAGES, Run, Study, head, spread, write_study
from subjects import Place
from yardstick import losses

import gfprune_cli as gfprune
from gfprune_cli.pruning.result import PruneResults

TARGETS = (0.3, 0.5, 0.7)


def measure(place: Place, seed: int) -> Run:
    """Held-out loss of every network, in order, and what each way took."""
    target = place.open()
    shared: dict[str, Any] = dict(
        data=str(place.data), images=ALL_IMAGES, seed=seed, recover=0, device="cpu", precision="fp32"
    )

    def made(sparsity: Any) -> tuple[list[float], float, float]:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = gfprune.prune(target.model, sparsity=sparsity, out=Path(folder) / "out", **shared)
            seconds = time.process_time() - start
            networks = found.networks if isinstance(found, PruneResults) else (found,)
            values = [losses(target, gfprune.load(str(one.output)), 1024)[0] for one in networks]
        return values, networks[-1].scoring_gradients, seconds

    series, gradients, seconds = made(TARGETS)
    single = [made(sparsity) for sparsity in TARGETS]
    return {
        "series": series,
        "single": [values[0] for values, _, _ in single],
        "gradients": (gradients, sum(one[1] for one in single)),
        "seconds": (seconds, sum(one[2] for one in single)),
    }


def lines(study: Study) -> Iterator[str]:
    yield "Held-out loss after the refit at each sparsity of both; mean, lowest and highest seed in brackets."
    started = {name: study.start(measure, place) for name, place in study.subjects.items()}
    for name, under_way in started.items():
        runs = under_way()
        yield from ("", f"## {name}", *head("", *(f"{one:g}" for one in TARGETS), "gradients", "seconds"))
        for side, (key, words) in enumerate((("series", "one flow"), ("single", "a run for each"))):
            cells = [spread([run[key][place] for run in runs], 4) for place in range(len(TARGETS))]
            spent = [spread([run[what][side] for run in runs], 0) for what in ("gradients", "seconds")]
            yield f"| {words} | {' | '.join([*cells, *spent])} |"


if __name__ == "__main__":
    write_study(__file__, str(__doc__), "Several sparsities from one flow", lines)
