"""What `finetune --lora` and `--optimizer adafactor` give beside the defaults, at equal steps.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --steps 1000 --rank 64

The demo, pruned to half of its parameters and MACs without recovery, is finetuned on its training images by
each row of flags. Prints the denoising loss on images that no run has seen. Runs that are done are kept in
--work.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from yardstick import demo, losses

import gfprune_cli as gfprune

ALL_IMAGES = 10**6


def rows(rank: int) -> list[dict[str, Any]]:
    """Settings that are compared: the defaults first."""
    lora = {"lora": rank}
    return [
        {"optimizer": "muon", "learning_rate": 1.5e-3},
        *(lora | {"optimizer": "muon", "learning_rate": rate} for rate in (3e-3, 1e-2, 1e-3)),
        {"optimizer": "adafactor", "learning_rate": 3e-2},
        *(lora | {"optimizer": "adamw", "learning_rate": rate} for rate in (3e-3, 1e-2)),
        *({"optimizer": "adafactor", "learning_rate": rate} for rate in (1e-2, 1e-1)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/adapters"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    target, pruned = demo(), options.work / "pruned"
    data: dict[str, Any] = dict(data=str(target.data), images=ALL_IMAGES)
    if not pruned.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        gfprune.prune(target.model, out=pruned, sparsity=0.5, recover=0, **data)
    before, dense = (losses(target, gfprune.load(model))[0] for model in (pruned, target.model))
    print(f"Loss: dense {dense:.4f}, pruned {before:.4f}\n\n| flags | loss |\n|---|---|", flush=True)
    for settings in rows(options.rank):
        text = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        store = options.work / f"{options.steps} {text}.json"
        if not store.exists():
            out = options.work / "out"
            how: dict[str, Any] = dict(steps=options.steps, force=True, save_every=0, sample_every=0)
            gfprune.finetune(pruned, out=out, **how, **data, **settings)
            store.write_text(json.dumps(losses(target, gfprune.load(out))[0]))
        print(f"| `{text}` | {json.loads(store.read_text()):.4f} |", flush=True)


if __name__ == "__main__":
    main()
