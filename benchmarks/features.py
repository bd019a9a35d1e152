"""Does recovery gain by comparing features of the kept channels, and up to which length?

    python benchmarks/features.py
    python benchmarks/features.py --subjects demo --steps 50 --seeds 1

Networks are pruned to half of their parameters and MACs, and trained by `prune --recover` with the term and
without. Measured on held-out images and on samples from the same noise. Networks other than the demo are
those that `quality.py` trains. Writes docs/benchmarks/features.md.
"""

import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from chain import ALL_IMAGES, spread
from provenance import PAGES, write_page
from subjects import Place, places_of
from yardstick import Yardstick

import gfprune_cli as gfprune
from gfprune_cli.pruning import networks

DIGITS = {"loss": 4, "ssim": 3, "fd_teacher": 2, "seconds": 0}
SAMPLES, SAMPLE_STEPS = 128, 20


def measure(place: Place, steps: int, weight: float, seed: int) -> dict[str, Any]:
    """The network that one run writes, and the seconds of its recovery."""
    torch.set_num_threads(1)
    networks.FEATURES = weight
    target = place.open()
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = dict(data=str(place.data), images=ALL_IMAGES)
        out = Path(folder) / "out"
        done = gfprune.prune(target.model, sparsity=0.5, recover=steps, seed=seed, out=out, **data)
        found = Yardstick(target, SAMPLES, SAMPLE_STEPS).measure(gfprune.load(out))
    return {**found, "seconds": done.seconds_by_phase["recovery"]}


def row(head: str, runs: list[dict[str, Any]]) -> str:
    cells = [spread([run[name] for run in runs], digits) for name, digits in DIGITS.items()]
    return f"| {head} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["demo", "second", "third"])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 400])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark/full"), help="networks of quality.py"
    )
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    places = places_of(options.work)
    lines = ["Mean, lowest and highest seed in brackets; seconds of the recovery alone."]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            (name, steps, weight): [
                pool.submit(measure, places[name], steps, weight, seed) for seed in range(options.seeds)
            ]
            for steps in options.steps
            for name in options.subjects
            for weight in options.weights
        }
        for (name, steps, weight), runs in futures.items():
            if weight == options.weights[0]:
                head = f"## {name}, {steps} steps"
                lines += [
                    "",
                    head,
                    "",
                    "| weight | held-out loss | SSIM | fd_teacher | seconds |",
                    "|---" * 5 + "|",
                ]
            lines.append(row(f"{weight:g}", [run.result() for run in runs]))
            print("\n".join(lines[-1:]), flush=True)
    listed = {"subjects": options.subjects, "steps": options.steps, "weights": options.weights}
    flags = " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in listed.items())
    command, title = f"python benchmarks/features.py {flags} --seeds {options.seeds}", "Features in recovery"
    print(
        write_page(options.out / "features.md", title, command, f"0 to {options.seeds - 1}", "\n".join(lines))
    )


if __name__ == "__main__":
    main()
