"""What widths of their own buy: adaptive against native layout, at equal parameters or equal MACs.

    python benchmarks/allocation.py

The native layout comes first, at the point nearest to each sparsity. The adaptive one then gets what the
native network has, in parameters or in MACs, with groups compared by measured losses or by scores alone. All
are pruned in one shot and finetuned alike. Writes docs/benchmarks/allocation.md: the denoising loss on the
demo's held-out images.
"""

import argparse
import shlex
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


def rows(sparsity: float, options: argparse.Namespace) -> list[str]:
    """The native layout nearest to a sparsity, and adaptive ones of its size, as lines of the table."""
    native = {"layout": "native", "sparsity": sparsity}
    plan = gfprune.prune("demo", dry_run=True, **native)
    params, macs = (1 - size["after"] / size["before"] for size in (plan.params, plan.macs))
    layouts: dict[str, dict[str, Any]] = {
        "native": native,
        "adaptive, the same parameters": {"sparsity": params},
        "adaptive, the same MACs": {"sparsity": macs, "budget": "macs"},
    }
    for name in list(layouts)[1:]:
        layouts[f"{name}, by scores"] = layouts[name] | {"allocation": "scores"}
    found = []
    for name, layout in layouts.items():
        runs = [run(layout, options.steps, seed) for seed in range(options.seeds)]
        mean = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        tuned = [one["finetuned"] for one in runs]
        spread = f" ({min(tuned):.4f} to {max(tuned):.4f})" if len(runs) > 1 else ""
        found.append(
            f"| {name} | {mean['params']:.1%} | {mean['macs']:.1%} | {mean['removed']:.4f} | "
            f"{mean['finetuned']:.4f}{spread} |"
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.44, 0.75])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of finetuning")
    parser.add_argument("--out", type=Path, default=PAGES / "allocation.md")
    options = parser.parse_args()
    dense, _ = losses(demo(), demo().dense, DRAWS)
    lines = ["| layout | parameters | MACs | after removal | after finetuning |", "|---" * 5 + "|"]
    for sparsity in options.sparsity:
        lines += rows(sparsity, options)
    seeds = "one seed" if options.seeds == 1 else f"means of {options.seeds} seeds, the range in brackets"
    body = (
        "Denoising loss of the demo on held-out images after `gfprune prune --one-shot`, and after "
        f"{options.steps} steps of `gfprune finetune`; {seeds}. "
        f"Dense: {dense:.4f}.\n\n" + "\n".join(lines)
    )
    command = shlex.join(["python", "benchmarks/allocation.py", *sys.argv[1:]])
    print(write_page(options.out, "Widths of their own, or one ratio", command, 0, body))


if __name__ == "__main__":
    main()
