"""What each part of `gfprune prune` buys: criterion, refit, soft masks, budget, alignment; without recovery.

    python benchmarks/chain.py
    python benchmarks/chain.py --subjects demo --seeds 1 --sparsity 0.75

One row for each setting, everything else at its default and `--recover 0`, so that no weight trains. Criteria
that need gradients have about equal costs: 48 gradients of one sample for each scoring. They run with every
seed, with their range in brackets; the other settings with the first. Losses are taken on
held-out images, SSIM and fd_teacher as in `quality.py`. Networks other than the demo are those that
`quality.py` trains: run it first, or leave them out. Writes docs/benchmarks/chain.md.
"""

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from provenance import PAGES, write_page
from subjects import Place, places_of
from yardstick import Yardstick

import gfprune_cli as gfprune

ALL_IMAGES = 10**6
SAMPLES, SAMPLE_STEPS = 64, 20
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "Criteria": {
        "`taylor`": dict(criterion="taylor", draws=48),
        "`fisher`": dict(criterion="fisher", draws=48),
        "`gradient-flow-abs`": dict(criterion="gradient-flow-abs", draws=16),
        "`gradient-flow`, signed, as published": dict(criterion="gradient-flow", draws=16),
        "`diff-pruning`": dict(criterion="diff-pruning", draws=48),
        "`magnitude`": dict(criterion="magnitude"),
        "`random`": dict(criterion="random"),
    },
    "Flow and refit": {
        "defaults": {},
        "`--no-refit`": dict(refit=False),
        "`--one-shot`": dict(one_shot=True),
        "`--one-shot --no-refit`": dict(one_shot=True, refit=False),
        "`--iterations 2`": dict(iterations=2),
        "`--iterations 4`": dict(iterations=4),
        "`--iterations 4 --bound 1`": dict(iterations=4, bound=1.0),
    },
    "Budget and alignment": {
        "`--budget macs`": dict(budget="macs"),
        "`--budget params`": dict(budget="params"),
        "`--align 8`": dict(align=8),
        "`--align 16`": dict(align=16),
    },
}


def measure(
    place: Place, settings: dict[str, Any], sparsity: float, seed: int, cache: Path
) -> dict[str, Any]:
    """The numbers of one run, in a process of its own with one thread."""
    torch.set_num_threads(1)
    subject = place.open()
    with tempfile.TemporaryDirectory() as folder:
        result = gfprune.prune(
            place.model,
            out=Path(folder) / "pruned",
            data=str(place.data),
            images=ALL_IMAGES,
            sparsity=sparsity,
            seed=seed,
            **{"recover": 0, **settings},
        )
        network = gfprune.load(str(result.output))
    found = Yardstick(subject, SAMPLES, SAMPLE_STEPS, cache=cache).measure(network)
    sizes = {
        key: pair["after"] / pair["before"]
        for key, pair in (("params", result.params), ("macs", result.macs))
    }
    return {**found, **sizes, "gradients": result.scoring_gradients, "dense": result.loss["before"]}


def cell(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    return spread([run[key] for run in runs], digits)


def spread(values: list[float], digits: int) -> str:
    """The mean over seeds, with their range."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def shares(runs: list[dict[str, Any]]) -> str:
    """What is left of parameters and MACs, as two cells."""
    return " | ".join(f"{statistics.mean(run[key] for run in runs):.1%}" for key in ("params", "macs"))


def quality(runs: list[dict[str, Any]]) -> str:
    return " | ".join(
        cell(runs, key, digits) for key, digits in (("loss", 4), ("ssim", 3), ("fd_teacher", 2))
    )


def row(name: str, runs: list[dict[str, Any]]) -> str:
    gradients = statistics.mean(run["gradients"] for run in runs)
    return f"| {name} | {shares(runs)} | {gradients:.0f} | {quality(runs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["demo", "second", "third"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark/full"), help="networks of quality.py"
    )
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    places = places_of(options.work)
    caches = options.work / "chain"
    caches.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for name in options.subjects:
            place, cache = places[name], caches / f"{name}.safetensors"
            dense = pool.submit(dense_numbers, place, cache).result()
            futures = {
                (title, label, seed): pool.submit(measure, place, settings, options.sparsity, seed, cache)
                for title, rows in SETTINGS.items()
                for label, settings in rows.items()
                for seed in seeds_of(title, options.seeds)
            }
            lines += ["", f"## {name}, {options.sparsity:g} of both", "", f"Dense: {dense:.4f}."]
            for title, rows in SETTINGS.items():
                lines += ["", f"{title}:", "", HEADER, "|---" * 7 + "|"]
                for label in rows:
                    runs = [futures[title, label, seed].result() for seed in seeds_of(title, options.seeds)]
                    lines.append(row(label, runs))
                    print(name, lines[-1], flush=True)
    command = f"python benchmarks/chain.py --subjects {' '.join(options.subjects)} --seeds {options.seeds}"
    command += f" --sparsity {options.sparsity:g}"
    title = "What each part of a run buys"
    print(write_page(options.out / "chain.md", title, command, f"0 to {options.seeds - 1}", "\n".join(lines)))


def seeds_of(title: str, seeds: int) -> range:
    return range(seeds if title == "Criteria" else 1)


HEADER = "| | parameters | MACs | gradients | held-out loss | SSIM | fd_teacher |"


def dense_numbers(place: Place, cache: Path) -> float:
    """Held-out loss of the dense network; its other numbers are kept for the runs."""
    torch.set_num_threads(1)
    return float(Yardstick(place.open(), SAMPLES, SAMPLE_STEPS, cache=cache).losses[0])


if __name__ == "__main__":
    main()
