"""Which criterion prunes best? Every criterion at equal steps, on held-out images that no run has seen.

    python benchmarks/criteria.py --sparsity 0.5 --seeds 1

Prints a Markdown table: denoising loss on the demo's held-out images, dense and pruned. Scoring is not
charged: its cost, counted in gradients over the draws, is a column of its own.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import gfprune_cli as gfprune
from gfprune_cli.checkpoint.reader import inspect, load_scheduler
from gfprune_cli.checkpoint.source import DEMO, resolve
from gfprune_cli.data.conditions import call
from gfprune_cli.data.diffusion import noising_process
from gfprune_cli.data.draws import Draws
from gfprune_cli.data.images import to_model_range
from gfprune_cli.recipes.prune import CriterionName

DRAWS = 1024


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    """Denoising loss on the demo's held-out images, the same draws at every call."""
    with np.load(DEMO / "images.npz") as data:
        images = to_model_range(torch.from_numpy(data["held_out"]).permute(0, 3, 1, 2).contiguous())
    process = noising_process(load_scheduler(inspect(resolve("demo"))))
    draws, total = Draws(images, process.steps, seed=1), 0.0
    for first in range(0, DRAWS, 64):
        batch = draws.batch("held-out", 0, 64, first=first, of=DRAWS)
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        output = call(model, noisy, process.timesteps(batch.index), None)
        total += float(process.losses(output, batch.images, batch.noise, batch.index).sum())
    return total / DRAWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--budget", default="params")
    parser.add_argument("--layout", default="adaptive")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="training steps per iteration")
    parser.add_argument("--criteria", nargs="*", default=list(CriterionName.__args__))
    parser.add_argument("--modes", nargs="*", default=["soft", "one-shot"])
    options = parser.parse_args()
    settings = dict(sparsity=options.sparsity, budget=options.budget, layout=options.layout)
    print(f"dense {held_out_loss(gfprune.load('demo')):.5f}")
    print("| mode | criterion | seed | held-out loss | self-drawn loss | MACs left | scoring | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        for mode in options.modes:
            for criterion in options.criteria:
                with tempfile.TemporaryDirectory() as folder:
                    out, start = Path(folder) / "out", time.time()
                    extra = (
                        {"one_shot": True} if mode == "one-shot" else {"steps_per_iteration": options.steps}
                    )
                    result = gfprune.prune(
                        "demo", out=out, criterion=criterion, seed=seed, **settings, **extra
                    )
                    loss = held_out_loss(gfprune.load(out))
                print(
                    f"| {mode} | {criterion} | {seed} | {loss:.5f} | {result.loss['removed']:.5f} | "
                    f"{result.macs['after'] / result.macs['before']:.3f} | {result.scoring_gradients:g} | "
                    f"{time.time() - start:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
