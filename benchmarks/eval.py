"""How long an evaluation takes: `gfprune eval` of a pruned demo against the demo.

    python benchmarks/eval.py

Prunes the demo by half without recovery (what is left does not change the evaluation's cost by much), then
times the command in a process of its own, imports included. The limit is five minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LIMIT = 300.0  # seconds
QUICK = ["--images", "32", "--sample-steps", "4", "--iterations", "2", "--recover", "0"]


def gfprune(*arguments: object) -> str:
    """Standard output of one command."""
    command = [sys.executable, "-m", "gfprune_cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluate(model: Path, samples: int, steps: int, more: list[str]) -> float:
    """Seconds that one evaluation takes; prints what it found."""
    start = time.perf_counter()
    printed = gfprune(
        *("eval", "--model", model, "--reference", "demo", "--samples", samples, "--steps", steps),
        *("--html", model.parent / "eval.html", "--offline", "--json", "-q", *more),
    )
    seconds = time.perf_counter() - start
    document = json.loads(printed)
    for name, metric in document["metrics"].items():
        print(f"{name} {metric['value']:.4g}")
    for row in document["latency"]:
        print(
            f"{row['mode']}, batch {row['batch']}: {row['ms_reference']:.1f} -> {row['ms']:.1f} ms, "
            f"{row['speedup']:.2f} x ({row['mac_ratio']:.2f} x fewer MACs)"
        )
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / "pruned"
        gfprune("prune", "--model", "demo", "--sparsity", "0.5", "--out", pruned, "-q", *QUICK)
        seconds = evaluate(pruned, options.samples, options.steps, more)
    print(
        f"\n{options.samples} samples, {options.steps} steps: {seconds:.0f} s on {torch.get_num_threads()} "
        f"threads (limit {LIMIT:.0f} s)"
    )
    sys.exit(seconds > LIMIT)
