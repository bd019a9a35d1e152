"""Several sparsities from one flow, beside one run for each: are the networks as good, and what do they cost?

    python benchmarks/series.py
    python benchmarks/series.py --subjects demo --seeds 1

`--recover 0`, so that flows are compared and no training. Losses are taken on held-out images. Seconds are
processor time on one thread; those of single runs are added up. Networks other than the demo are those that
`quality.py` trains. Writes docs/benchmarks/series.md.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from chain import ALL_IMAGES, spread
from provenance import PAGES, write_page
from subjects import Place, places_of
from yardstick import losses

import gfprune_cli as gfprune
from gfprune_cli.pruning.result import PruneResults

TARGETS = (0.3, 0.5, 0.7)


def measure(place: Place, seed: int) -> dict[str, Any]:
    """Held-out loss of every network, in order, and what each way took."""
    torch.set_num_threads(1)
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


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [f"| | {' | '.join(f'{one:g}' for one in TARGETS)} | gradients | seconds |", "|---" * 6 + "|"]
    for side, (key, name) in enumerate((("series", "one flow"), ("single", "a run for each"))):
        cells = [spread([run[key][place] for run in runs], 4) for place in range(len(TARGETS))]
        spent = [spread([run[what][side] for run in runs], 0) for what in ("gradients", "seconds")]
        lines.append(f"| {name} | {' | '.join([*cells, *spent])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["demo", "second", "third"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark/full"), help="networks of quality.py"
    )
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    places = places_of(options.work)
    lines = [
        "Held-out loss after the refit at each sparsity of both; mean, lowest and highest seed in brackets."
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            name: [pool.submit(measure, places[name], seed) for seed in range(options.seeds)]
            for name in options.subjects
        }
        for name, runs in futures.items():
            lines += ["", f"## {name}", "", *table([run.result() for run in runs])]
            print("\n".join(lines[-4:]), flush=True)
    command = f"python benchmarks/series.py --subjects {' '.join(options.subjects)} --seeds {options.seeds}"
    title = "Several sparsities from one flow"
    print(
        write_page(options.out / "series.md", title, command, f"0 to {options.seeds - 1}", "\n".join(lines))
    )


if __name__ == "__main__":
    main()
