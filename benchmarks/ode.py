"""Does the gradient flow do better as the differential equation of SpODE than as a score?

    python benchmarks/ode.py

SpODE (Mo, Shi, Pan, ICML 2023) lets masks move along  d = x e + y g,  e = -dE/dm the flow of the energy and
g = -dC/dm that of the cost C, here of the parameters, so that g . d = 1 and |d| |g| = r: cost falls at a
fixed rate, and r says how much of the motion the energy has. Four steps are taken, each a fifth of the cost,
with Hessian products of 4 samples, together the 48 gradients that the criteria of `chain.py` have; where the
masks arrive is the score. Everything else is as there. Writes docs/benchmarks/ode.md.
"""

import argparse
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from chain import HEADER, dense_numbers, measure, row
from provenance import PAGES, write_page
from subjects import Place, places_of

from gfprune_cli.flow.criteria import CRITERIA, Evidence
from gfprune_cli.flow.mask import Masks
from gfprune_cli.flow.unit_sums import unit_sums

STEPS, SHARE, DRAWS = 4, 0.2, 4
RATIOS = (1.5, 4.0, 16.0)


def direction(energy: torch.Tensor, cost: torch.Tensor, ratio: float) -> torch.Tensor:
    """d with g . d = 1 and |d| |g| = ratio, in the plane of the flows of energy and cost; all [units]."""
    length = cost.norm()
    along = cost / length
    across = energy - (energy @ along) * along
    return (along + math.sqrt(ratio**2 - 1) * across / across.norm().clamp_min(1e-300)) / length


def integrated(evidence: Evidence, ratio: float) -> Masks:
    """Where the masks arrive."""
    masked, before = evidence.masked, evidence.masked.masks
    names = list(before)
    weights = {name: torch.ones_like(weight) for name, weight in masked.weights.items()}
    sizes = [len(mask) for mask in before.values()]
    counted = unit_sums(masked, weights, lambda _, one: one)
    cost = -torch.cat([counted[name] for name in names]).double().cpu()
    masks = torch.cat(list(before.values()))
    for _ in range(STEPS):
        masked.set_masks(dict(zip(names, masks.split(sizes), strict=True)))
        flow = evidence.energy_flow()
        energy = torch.cat([flow[name].double().cpu() for name in names])
        step = SHARE * float(-cost.sum())
        masks = (masks + step * direction(energy, cost, ratio)).clamp(0, 1)
    masked.set_masks(before)
    return dict(zip(names, masks.split(sizes), strict=True))


def run(place: Place, ratio: float, sparsity: float, seed: int, cache: Path) -> dict[str, Any]:
    """`chain.measure` with the signed flow's row replaced by the integrated one, in a process of its own."""
    name = "gradient-flow"
    CRITERIA[name] = replace(CRITERIA[name], score=lambda evidence: integrated(evidence, ratio))
    return measure(place, dict(criterion=name, draws=DRAWS), sparsity, seed, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/full"), help="of quality.py")
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    caches = options.work / "chain"
    caches.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for name, place in places_of(options.work).items():
            cache = caches / f"{name}.safetensors"
            dense = pool.submit(dense_numbers, place, cache).result()
            futures = {
                (ratio, seed): pool.submit(run, place, ratio, options.sparsity, seed, cache)
                for ratio in RATIOS
                for seed in range(options.seeds)
            }
            lines += ["", f"## {name}, {options.sparsity:g} of both", "", f"Dense: {dense:.4f}.", ""]
            lines += [HEADER, "|---" * 7 + "|"]
            for ratio in RATIOS:
                runs = [futures[ratio, seed].result() for seed in range(options.seeds)]
                lines.append(row(f"r = {ratio:g}", runs))
                print(name, lines[-1], flush=True)
    command = f"python benchmarks/ode.py --seeds {options.seeds} --sparsity {options.sparsity:g}"
    title = "The flow as a differential equation"
    print(write_page(options.out / "ode.md", title, command, f"0 to {options.seeds - 1}", "\n".join(lines)))


if __name__ == "__main__":
    main()
