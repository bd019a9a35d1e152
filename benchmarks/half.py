"""What refits lose where weights are kept in half precision, as they are where memory is short.

    python benchmarks/half.py
    python benchmarks/half.py --iterations 4 --images 64

The demo, stored in bfloat16, is pruned twice: with weights in float32, and kept in bfloat16. Prints the
denoising losses on held-out images, dense, behind masks after the last refit, and of the network as written.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import gfprune_cli
from gfprune_cli.checkpoint.source import DEMO
from gfprune_cli.pruning.job import PruneJob

PLAN_MEMORY = PruneJob.plan_memory


def kept_in_half(job: PruneJob, one: Any) -> None:
    """The plan of a run with room for all, but for the precision of its weights."""
    PLAN_MEMORY(job, one)
    job.memory = replace(job.memory, half="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| sparsity | weights while pruning | dense | last refit, before | after | as written |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "demo"
        DiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.bfloat16).save_pretrained(folder)
        for sparsity in options.sparsity:
            for precision, plan in (("float32", PLAN_MEMORY), ("bfloat16", kept_in_half)):
                PruneJob.plan_memory = plan  # type: ignore[method-assign]
                found = gfprune_cli.prune(
                    str(folder),
                    sparsity=sparsity,
                    iterations=options.iterations,
                    images=options.images,
                    data=str(DEMO / "images.npz"),
                    seed=options.seed,
                    recover=0,
                    out=Path(root) / f"{precision}-{sparsity}",
                )
                last = found.refit["iterations"][-1]
                numbers = (found.loss["before"], last["before"], last["after"], found.loss["removed"])
                cells = " | ".join(f"{number:.5f}" for number in numbers)
                print(f"| {sparsity:.0%} | {precision} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
