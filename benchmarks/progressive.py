"""Criteria and their settings in the progressive run: scored at the masked network, trained in between.

    python benchmarks/progressive.py

Every row is `gfprune prune` on the demo and its training images with one setting changed. Training steps are
equal (none with --one-shot) and scoring is not charged: its cost is a column. Writes
docs/benchmarks/progressive.md.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from provenance import PAGES, write_page
from yardstick import demo, losses

import gfprune_cli as gfprune
from gfprune_cli.flow import loop
from gfprune_cli.recipes.prune import PruneRecipe

DRAWS = 1024
ROWS: dict[str, dict[str, Any]] = {
    "`taylor` (the defaults)": {},
    "`taylor --align 4`": {"align": 4},
    "`taylor --allocation scores`": {"allocation": "scores"},
    "`gradient-flow-abs --allocation measured`": {
        "criterion": "gradient-flow-abs",
        "allocation": "measured",
    },
    "`gradient-flow-abs --allocation scores`": {"criterion": "gradient-flow-abs", "allocation": "scores"},
    "`gradient-flow-abs --allocation measured --coarse`": {
        "criterion": "gradient-flow-abs",
        "allocation": "measured",
        "coarse": True,
    },
    "`taylor --coarse`": {"coarse": True},
    "`random`": {"criterion": "random"},
    "`gradient-flow`": {"criterion": "gradient-flow"},
    "`taylor --one-shot`": {"one_shot": True},
    "`gradient-flow-abs --allocation measured --one-shot`": {
        "criterion": "gradient-flow-abs",
        "allocation": "measured",
        "one_shot": True,
    },
    "`taylor`, no momentum": {"momentum": 0.0},
    "`taylor`, momentum 0.9": {"momentum": 0.9},
    "`taylor --iterations 5 --steps-per-iteration 20`": {"iterations": 5, "steps_per_iteration": 20},
    "`taylor --iterations 25 --steps-per-iteration 4`": {"iterations": 25, "steps_per_iteration": 4},
}


def row(settings: dict[str, Any], sparsity: float, seed: int) -> str:
    """Held-out loss after pruning, MACs left, gradients of scoring counted in samples."""
    target = demo()
    chosen = {name: value for name, value in settings.items() if name != "momentum"}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(loop, "MOMENTUM", settings.get("momentum", loop.MOMENTUM)),
    ):
        out = Path(folder) / "out"
        data = dict(data=str(target.data), images=10**6)
        result = gfprune.prune("demo", out=out, sparsity=sparsity, seed=seed, **data, **chosen)
        loss, _ = losses(target, gfprune.load(out), DRAWS)
    macs = result.macs["after"] / result.macs["before"]
    scored = result.scoring_gradients * PruneRecipe().draws
    return f"{loss:.4f} | {macs:.1%} | {scored:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGES / "progressive.md")
    options = parser.parse_args()
    dense, _ = losses(demo(), demo().dense, DRAWS)
    intro = f"Sparsity {options.sparsity:g}, one seed; held-out denoising loss, dense {dense:.4f}.\n"
    table = [
        "| `gfprune prune` with | held-out loss | MACs left | gradients of scoring |",
        "|---|---|---|---|",
    ]
    command = shlex.join(["python", "benchmarks/progressive.py", *sys.argv[1:]])
    for number, (name, settings) in enumerate(ROWS.items(), 1):
        table.append(f"| {name} | {row(settings, options.sparsity, options.seed)} |")
        print(table[-1], flush=True)
        left = f"**Not complete:** {number} of {len(ROWS)} rows.\n" if number < len(ROWS) else ""
        body = "\n".join([*filter(None, [left]), intro, *table])
        write_page(options.out, "Criteria in the progressive run", command, options.seed, body)


if __name__ == "__main__":
    main()
