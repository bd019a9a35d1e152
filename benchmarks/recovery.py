"""What brings quality back? Losses of `gfprune finetune` at equal steps, on images that no run has seen.

    python benchmarks/recovery.py --seeds 3 --steps 500

Prunes the demo in one shot, so that removal leaves a gap, then trains with each set of losses. Prints a
Markdown table: denoising loss on the demo's held-out images, the share of the gap towards the dense model
that closed, and the seconds of each run. Jacobian matching runs a pass more on each network, so its
equal-cost row has fewer steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn
from yardstick import demo, losses

import gfprune_cli as gfprune

DRAWS = 1024


def held_out_loss(model: nn.Module) -> float:
    return losses(demo(), model, DRAWS)[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "denoising": dict(denoise=1.0, distill=0.0),
    "distillation": dict(denoise=0.0, distill=1.0),
    "default": {},
    "default + features 0.01": dict(features=0.01),
    "default + features 0.1": dict(features=0.1),
    "default + Jacobian 0.01": dict(jacobian=0.01),
    "default + min-SNR 5": dict(min_snr=5.0),
    "default, antithetic": dict(timesteps="antithetic"),
    "default, uniform": dict(timesteps="uniform"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--data", default="self", help="as of gfprune finetune")
    parser.add_argument("--settings", default="", help="more recipe settings: name=number,name=number")
    options = parser.parse_args()
    more = {k: float(v) for k, v in (part.split("=") for part in options.settings.split(",") if part)}
    more = {name: int(value) if value == int(value) else value for name, value in more.items()}
    dense = held_out_loss(gfprune.load("demo"))
    print(f"dense {dense:.5f}, {options.steps} steps, data {options.data} {options.settings}", flush=True)
    print("| losses | seed | removed | after | gap closed | seconds |\n|---|---|---|---|---|---|", flush=True)
    closed: dict[str, list[float]] = {name: [] for name in options.variants}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            pruned = Path(folder) / f"pruned-{seed}"
            gfprune.prune("demo", sparsity=options.sparsity, one_shot=True, seed=seed, out=pruned)
            removed = held_out_loss(gfprune.load(pruned))
            for name in options.variants:
                out, start = Path(folder) / "out", time.perf_counter()
                settings = dict(steps=options.steps, data=options.data, seed=seed) | more | VARIANTS[name]
                gfprune.finetune(pruned, out=out, force=True, save_every=0, sample_every=0, **settings)
                seconds = time.perf_counter() - start
                after = held_out_loss(gfprune.load(out))
                share = (removed - after) / (removed - dense)
                closed[name].append(share)
                print(
                    f"| {name} | {seed} | {removed:.5f} | {after:.5f} | {share:.0%} | {seconds:.0f} |",
                    flush=True,
                )
    print("\n| losses | gap closed, mean | standard deviation |\n|---|---|---|")
    for name, shares in closed.items():
        spread = statistics.stdev(shares) if len(shares) > 1 else float("nan")
        print(f"| {name} | {statistics.mean(shares):.0%} | {spread:.0%} |")


if __name__ == "__main__":
    main()
