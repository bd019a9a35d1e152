"""What widths of their own buy: adaptive against native layout, at equal parameters or equal MACs.

    python benchmarks/allocation.py

The native layout comes first, at the point nearest to each sparsity. The adaptive one then gets what the
native network has, in parameters or in MACs. Both are pruned in one shot and finetuned alike. Writes
docs/benchmarks/allocation.md: the denoising loss on the demo's held-out images.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import PAGES, write_page
from yardstick import demo, losses

import gfprune_cli as gfprune

DRAWS = 512


def run(settings: dict[str, Any], steps: int, seed: int) -> dict[str, float]:
    """What is left of the demo, and its held-out loss after removal and after finetuning."""
    target = demo()
    common = dict(data=str(target.data), images=10**6, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        pruned, tuned = Path(folder) / "pruned", Path(folder) / "tuned"
        result = gfprune.prune("demo", out=pruned, one_shot=True, **settings, **common)
        removed, _ = losses(target, gfprune.load(pruned), DRAWS)
        gfprune.finetune(pruned, out=tuned, steps=steps, save_every=0, sample_every=0, **common)
        tuned_loss, _ = losses(target, gfprune.load(tuned), DRAWS)
    return {
        "params": result.params["after"] / result.params["before"],
        "macs": result.macs["after"] / result.macs["before"],
        "removed": removed,
        "finetuned": tuned_loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.44, 0.75])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of finetuning")
    parser.add_argument("--out", type=Path, default=PAGES / "allocation.md")
    options = parser.parse_args()
    dense, _ = losses(demo(), demo().dense, DRAWS)
    lines = ["| layout | parameters | MACs | after removal | after finetuning | range |", "|---" * 6 + "|"]
    for sparsity in options.sparsity:
        native = run({"layout": "native", "sparsity": sparsity}, 1, 0)
        layouts = {
            "native": {"layout": "native", "sparsity": sparsity},
            "adaptive, the same parameters": {"sparsity": 1 - native["params"]},
            "adaptive, the same MACs": {"sparsity": 1 - native["macs"], "budget": "macs"},
        }
        for name, settings in layouts.items():
            runs = [run(settings, options.steps, seed) for seed in range(options.seeds)]
            mean = {key: statistics.mean(found[key] for found in runs) for key in runs[0]}
            tuned = [found["finetuned"] for found in runs]
            lines.append(
                f"| {name} | {mean['params']:.1%} | {mean['macs']:.1%} | {mean['removed']:.4f} | "
                f"{mean['finetuned']:.4f} | {min(tuned):.4f} to {max(tuned):.4f} |"
            )
            print(lines[-1], flush=True)
    body = (
        "Denoising loss of the demo on held-out images, one-shot removal, then "
        f"{options.steps} finetuning steps; {options.seeds} seeds. Dense: {dense:.4f}.\n\n" + "\n".join(lines)
    )
    command = " ".join(["python", "benchmarks/allocation.py", *sys.argv[1:]])
    print(write_page(options.out, "Widths of their own, or one ratio", command, 0, body))


if __name__ == "__main__":
    main()
