"""What each part of `gfprune prune` buys: criterion, refit, soft masks, budget, alignment; without recovery.

    python benchmarks/chain.py
    python benchmarks/chain.py --subjects demo --seeds 1 --sparsity 0.75

One row for each setting, everything else at its default and `--recover 0`, so that no weight trains. Criteria
that need gradients have about equal costs: 48 gradients of one sample for each scoring. They run with every
seed, with their range in brackets; the other settings with the first. Losses are taken on
held-out images, SSIM and fd_teacher as in `quality.py`. Networks other than the demo are those that
`quality.py` trains: run it first, or leave them out. Writes docs/benchmarks/chain.md.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import ALL_IMAGES, QUALITY_HEAD, Run, Study, cells, head, left, shares, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune

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


HEADER = head("", "parameters", "MACs", "gradients", QUALITY_HEAD)


def measure(place: Place, settings: dict[str, Any], sparsity: float, cache: Path, seed: int) -> Run:
    """The numbers of one run."""
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
    return {**found, **left(result), "gradients": result.scoring_gradients, "dense": result.loss["before"]}


def dense_numbers(place: Place, cache: Path) -> float:
    """Held-out loss of the dense network; its other numbers are kept for the runs."""
    return float(Yardstick(place.open(), SAMPLES, SAMPLE_STEPS, cache=cache).losses[0])


def row(name: str, runs: list[Run]) -> str:
    gradients = statistics.mean(run["gradients"] for run in runs)
    return f"| {name} | {shares(runs)} | {gradients:.0f} | {cells(runs)} |"


def introduced(study: Study, name: str) -> tuple[Path, list[str]]:
    """Where the numbers of a dense network are kept, and the lines above its tables."""
    cache = study.work / "chain" / f"{name}.safetensors"
    cache.parent.mkdir(exist_ok=True)
    dense = study.pool.submit(dense_numbers, study.subjects[name], cache).result()
    return cache, ["", f"## {name}, {study.own.sparsity:g} of both", "", f"Dense: {dense:.4f}."]


def lines(study: Study) -> Iterator[str]:
    for name, place in study.subjects.items():
        cache, said = introduced(study, name)
        runs = {
            title: {
                label: study.start(
                    measure, place, settings, study.own.sparsity, cache,
                    seeds=study.seeds if title == "Criteria" else range(1),
                )
                for label, settings in rows.items()
            }
            for title, rows in SETTINGS.items()
        }  # fmt: skip
        yield from said
        for title, rows in runs.items():
            yield from ("", f"{title}:", *HEADER)
            yield from (row(label, started()) for label, started in rows.items())


if __name__ == "__main__":
    write_study(__file__, str(__doc__), "What each part of a run buys", lines, sparsity=0.75)
