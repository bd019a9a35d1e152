"""What `finetune --lora` and `--optimizer adafactor` give beside the defaults, at equal steps.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --steps 1000 --rank 64

Networks pruned to half of their parameters and MACs without recovery are finetuned on their training images
by each row of flags: the demo, and those that `quality.py` has trained in --networks. Prints the denoising
loss on images that no run has seen. Runs that are done are kept in --work.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from provenance import flags, table
from study import ALL_IMAGES, FULL, once
from subjects import Place, places_of
from yardstick import losses

import gfprune_cli as gfprune


def rows(rank: int) -> list[dict[str, Any]]:
    """Settings that are compared: the defaults first."""
    lora = {"lora": rank}
    return [
        {"optimizer": "muon", "learning_rate": 1.5e-3},
        *(lora | {"optimizer": "muon", "learning_rate": rate} for rate in (3e-3, 1e-2, 3e-2)),
        *(lora | {"optimizer": "adamw", "learning_rate": rate} for rate in (3e-3, 1e-2)),
        *({"optimizer": "adafactor", "learning_rate": rate} for rate in (1.5e-3, 5e-3, 1e-2, 2e-2)),
    ]


def compared(place: Place, work: Path, steps: int, rank: int) -> dict[str, float]:
    """Words for a network -> its held-out loss, for the dense one, the pruned one, and what each row made."""
    target, pruned = place.open(), work / "pruned"
    data: dict[str, Any] = dict(data=str(target.data), images=ALL_IMAGES)
    if not pruned.exists():
        work.mkdir(parents=True, exist_ok=True)
        gfprune.prune(target.model, out=pruned, sparsity=0.5, recover=0, **data)
    found = {
        name: losses(target, gfprune.load(model))[0]
        for name, model in (("dense", target.model), ("pruned", pruned))
    }
    for settings in rows(rank):
        text = flags(settings)

        def measured(settings: dict[str, Any] = settings) -> float:
            how: dict[str, Any] = dict(steps=steps, force=True, save_every=0, sample_every=0)
            gfprune.finetune(pruned, out=work / "out", **how, **data, **settings)
            return losses(target, gfprune.load(work / "out"))[0]

        found[f"`{text}`"] = once(work / f"{steps} {text}.json", measured)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["demo", "second", "third"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--networks", type=Path, default=FULL)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/adapters"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    places = places_of(options.networks.absolute())
    found = {
        name: compared(places[name], options.work / name, options.steps, options.rank)
        for name in options.subjects
    }
    lines = [[row, *(f"{one[row]:.4f}" for one in found.values())] for row in next(iter(found.values()))]
    print(*table((f"held-out loss after {options.steps} steps", *found), lines), sep="\n")


if __name__ == "__main__":
    main()
