"""Does the gradient flow do better as the differential equation of SpODE than as a score?

    python benchmarks/ode.py

SpODE (Mo, Shi, Pan, ICML 2023) lets masks move along  d = x e + y g,  e = -dE/dm the flow of the energy and
g = -dC/dm that of the cost C, here of the parameters, so that g . d = 1 and |d| |g| = r: cost falls at a
fixed rate, and r says how much of the motion the energy has. Four steps are taken, each a fifth of the cost,
with Hessian products of 4 samples, together the 48 gradients that the criteria of `chain.py` have; where the
masks arrive is the score. Everything else is as there. Writes docs/benchmarks/ode.md.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from chain import HEADER, introduced, measure, row
from study import Run, Study, write_study
from subjects import Place

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


def run(place: Place, ratio: float, sparsity: float, cache: Path, seed: int) -> Run:
    """`chain.measure` with the signed flow's row replaced by the integrated one."""
    name = "gradient-flow"
    integrating = replace(CRITERIA[name], score=lambda evidence: integrated(evidence, ratio))
    with patch.dict(CRITERIA, {name: integrating}):  # the process goes on to other runs
        return measure(place, dict(criterion=name, draws=DRAWS), sparsity, cache, seed)


def lines(study: Study) -> Iterator[str]:
    for name, place in study.subjects.items():
        cache, said = introduced(study, name)
        runs = {ratio: study.start(run, place, ratio, study.own.sparsity, cache) for ratio in RATIOS}
        yield from (*said, *HEADER)
        yield from (row(f"r = {ratio:g}", started()) for ratio, started in runs.items())


if __name__ == "__main__":
    write_study(__file__, str(__doc__), "The flow as a differential equation", lines, sparsity=0.75)
