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

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from chain import cell, measure, quality, shares
from folding_networks import FAMILIES, folded_numbers, small_dit_folder, small_dit_numbers
from provenance import PAGES, write_page
from subjects import Place, places_of

import gfprune_cli as gfprune

RECOVER, SHORT = 400, 100  # steps of 8 samples
BUDGETS: dict[str, dict[str, Any]] = {"params, 0.75": dict(budget="params", sparsity=0.75)}
FOLDS = (0.0, 0.01)
NAMES = ("demo", *FAMILIES)


def once(path: Path, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Numbers that are kept at `path`."""
    if not path.exists():
        path.write_text(json.dumps(measured()))
    return dict(json.loads(path.read_text()))


def budget_run(place: Place, settings: dict[str, Any], seed: int, work: Path) -> dict[str, Any]:
    """The numbers of one pruned and trained network, in a process of its own with one thread."""
    name = "-".join(str(value) for value in (place.name, RECOVER, *settings.values(), seed))
    given = {"recover": RECOVER, **settings}
    sparsity, cache = given.pop("sparsity"), work / f"{place.name}.safetensors"
    return once(work / f"{name}.json", lambda: measure(place, given, sparsity, seed, cache))


def budget_lines(options: argparse.Namespace, pool: ProcessPoolExecutor) -> list[str]:
    place = places_of(options.work)["demo"]
    futures = {
        (label, fold, seed): pool.submit(budget_run, place, {**settings, "fold": fold}, seed, options.work)
        for label, settings in BUDGETS.items()
        for seed in range(options.seeds)
        for fold in FOLDS
    }
    lines = ["| budget | --fold | parameters | MACs | held-out loss | SSIM | fd_teacher |", "|---" * 7 + "|"]
    for label in BUDGETS:
        for fold in FOLDS:
            runs = [futures[label, fold, seed].result() for seed in range(options.seeds)]
            lines.append(f"| {label} | {fold:g} | {shares(runs)} | {quality(runs)} |")
            print(lines[-1], flush=True)
    return lines


def transformer_run(fold: float, seed: int, work: Path) -> dict[str, Any]:
    """The numbers of the small transformer, half of its parameters gone, in a process of its own."""
    torch.set_num_threads(1)

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            result = gfprune.prune(
                str(small_dit_folder(work)), out=Path(folder) / "pruned", sparsity=0.5, budget="params",
                fold=fold, seed=seed, recover=SHORT,
            )  # fmt: skip
            found = small_dit_numbers(gfprune.load(str(result.output)), work)
        sizes = {"params": result.params, "macs": result.macs}
        return {**found, **{key: pair["after"] / pair["before"] for key, pair in sizes.items()}}

    return once(work / f"small-dit-{SHORT}-{fold}-{seed}.json", measured)


def transformer_lines(options: argparse.Namespace, pool: ProcessPoolExecutor) -> list[str]:
    pool.submit(small_dit_folder, options.work).result()
    futures = {
        (fold, seed): pool.submit(transformer_run, fold, seed, options.work)
        for seed in range(options.seeds)
        for fold in FOLDS
    }
    lines = ["| --fold | parameters | MACs | held-out loss | SSIM |", "|---" * 5 + "|"]
    for fold in FOLDS:
        runs = [futures[fold, seed].result() for seed in range(options.seeds)]
        lines.append(f"| {fold:g} | {shares(runs)} | {cell(runs, 'loss', 4)} | {cell(runs, 'ssim', 3)} |")
    return lines


def network_lines(options: argparse.Namespace, pool: ProcessPoolExecutor) -> list[str]:
    futures = {name: pool.submit(folded_numbers, name, options.work) for name in NAMES}
    lines = [
        "| network | see no token | --fold | layers folded | ranks | parameters | saved | error of the worst "
        "layer | of the output | SSIM |",
        "|---" * 10 + "|",
    ]
    for name, future in futures.items():
        lines += [network_line(name, found) for found in future.result()]
    return lines


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/folding"))
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for part in options.parts:
            title, made = PARTS[part]
            lines += ["", f"## {title}", "", *made(options, pool)]
            print("\n".join(lines), flush=True)
    command = f"python benchmarks/folding.py --seeds {options.seeds}"
    print(write_page(options.out / "folding.md", "Modulation folding", command, "0 to 2", "\n".join(lines)))


if __name__ == "__main__":
    main()
