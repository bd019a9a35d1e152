"""What modulation folding saves, what it costs, and whether a budget is better spent with it.

    python benchmarks/folding.py
    python benchmarks/folding.py --parts budget --seeds 1

Three parts. `networks`: each network folded alone, without any training after it: parameters, error of the
network's output, and SSIM of samples from the same noise. Beside the demo these are a U-Net of the shape of
google/ddpm-cifar10-32 and transformers of the real widths but few blocks; they are trained here for a short
while, so that what folding sees is no random embedding. `budget`: the demo pruned with and without folding at
equal budgets, and trained alike. `transformer`: the same of a small DiT that is trained here. Runs are kept
in --work and not repeated. Writes docs/benchmarks/folding.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chain import measure
from folding_networks import FAMILIES, folded_numbers, small_dit_folder, small_dit_numbers
from study import QUALITY_HEAD, Run, Study, cells, head, left, once, shares, write_study
from subjects import Place

import gfprune_cli as gfprune

RECOVER, SHORT = 400, 100  # steps of 8 samples
BUDGETS: dict[str, dict[str, Any]] = {"params, 0.75": dict(budget="params", sparsity=0.75)}
FOLDS = (0.0, 0.01)
NAMES = ("demo", *FAMILIES)


def budget_run(place: Place, settings: dict[str, Any], work: Path, seed: int) -> Run:
    """The numbers of one pruned and trained network."""
    name = "-".join(str(value) for value in (place.name, RECOVER, *settings.values(), seed))
    given = {"recover": RECOVER, **settings}
    sparsity, cache = given.pop("sparsity"), work / f"{place.name}.safetensors"
    return once(work / f"{name}.json", lambda: measure(place, given, sparsity, cache, seed))


def budget_lines(study: Study) -> Iterator[str]:
    runs = {
        (label, fold): study.start(budget_run, study.subjects["demo"], {**settings, "fold": fold}, study.work)
        for label, settings in BUDGETS.items()
        for fold in FOLDS
    }
    yield from head("budget", "--fold", "parameters", "MACs", QUALITY_HEAD)
    for (label, fold), started in runs.items():
        found = started()
        yield f"| {label} | {fold:g} | {shares(found)} | {cells(found)} |"


def transformer_run(fold: float, work: Path, seed: int) -> Run:
    """The numbers of the small transformer, half of its parameters gone."""

    def measured() -> Run:
        with tempfile.TemporaryDirectory() as folder:
            result = gfprune.prune(
                str(small_dit_folder(work)), out=Path(folder) / "pruned", sparsity=0.5, budget="params",
                fold=fold, seed=seed, recover=SHORT,
            )  # fmt: skip
            found = small_dit_numbers(gfprune.load(str(result.output)), work)
        return {**found, **left(result)}

    return once(work / f"small-dit-{SHORT}-{fold}-{seed}.json", measured)


def transformer_lines(study: Study) -> Iterator[str]:
    study.pool.submit(small_dit_folder, study.work).result()
    runs = {fold: study.start(transformer_run, fold, study.work) for fold in FOLDS}
    yield from head("--fold", "parameters", "MACs", "held-out loss", "SSIM")
    for fold, started in runs.items():
        found = started()
        yield f"| {fold:g} | {shares(found)} | {cells(found, {'loss': 4, 'ssim': 3})} |"


def network_lines(study: Study) -> Iterator[str]:
    futures = {name: study.pool.submit(folded_numbers, name, study.work) for name in NAMES}
    yield from head(
        "network", "see no token", "--fold", "layers folded", "ranks", "parameters", "saved",
        "error of the worst layer", "of the output", "SSIM",
    )  # fmt: skip
    for name, future in futures.items():
        yield from (network_line(name, found) for found in future.result())


def network_line(name: str, found: dict[str, Any]) -> str:
    if "folded" not in found:
        return f"| {name} | | {found['tolerance']:g} | none | | | 0 | | | |"
    counts = f"{found['before']:,} to {found['after']:,}"
    return (
        f"| {name} | {found['share']:.1%} | {found['tolerance']:g} | "
        f"{found['folded']} of {found['layers']} | {found['ranks']} | {counts} | "
        f"{1 - found['after'] / found['before']:.1%} | {found['layer_error']:.2%} | "
        f"{found['output_error']:.2%} | {found['ssim']:.4f} |"
    )


PARTS = {
    "networks": ("Networks, folded alone, without training", network_lines),
    "budget": (f"The demo at equal budgets, {RECOVER} steps of training", budget_lines),
    "transformer": (f"A small DiT at half of its parameters, {SHORT} steps of training", transformer_lines),
}


def lines(study: Study) -> Iterator[str]:
    for part in study.own.parts:
        title, made = PARTS[part]
        yield from ("", f"## {title}", *made(study))


if __name__ == "__main__":
    write_study(
        __file__, str(__doc__), "Modulation folding", lines, subjects=("demo",),
        work=Path("build/benchmark/folding"), parts=list(PARTS),
    )  # fmt: skip
