"""What widths of their own buy: adaptive against native layout, at equal parameters or equal MACs.

    python benchmarks/allocation.py

The native layout comes first, at the point nearest to each sparsity. The adaptive one then gets what the
native network has, in parameters or in MACs. Its widths are multiples of what the device likes, or of 8 as
the native ones are. All are pruned in one shot and finetuned alike. Writes docs/benchmarks/allocation.md: the
denoising loss on the demo's held-out images, and the time of a batch beside the dense model's, both taking
turns.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import PAGES, write_page
from speed import interleaved
from torch import nn
from yardstick import Subject, demo, losses

import gfprune_cli as gfprune

DRAWS = 512
BATCH, ROUNDS = 16, 20  # of the timing
NATIVE_STEP = 8  # the stock class wants widths that its norm groups divide


def run(settings: dict[str, Any], steps: int, seed: int) -> dict[str, float]:
    """What is left of the demo, its held-out loss after removal and after finetuning, and its time."""
    target = demo()
    common = dict(data=str(target.data), images=10**6, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        pruned, tuned = Path(folder) / "pruned", Path(folder) / "tuned"
        result = gfprune.prune("demo", out=pruned, one_shot=True, **settings, **common)
        removed, _ = losses(target, gfprune.load(pruned), DRAWS)
        gfprune.finetune(pruned, out=tuned, steps=steps, save_every=0, sample_every=0, **common)
        network = gfprune.load(tuned)
    tuned_loss, _ = losses(target, network, DRAWS)
    return {
        "params": result.params["after"] / result.params["before"],
        "macs": result.macs["after"] / result.macs["before"],
        "time": time_left(target, network),
        "removed": removed,
        "finetuned": tuned_loss,
    }


@torch.inference_mode()
def time_left(target: Subject, network: nn.Module) -> float:
    """Time of a batch over that of the dense model, the median of pairs."""
    config = target.dense.config
    noisy = torch.randn(BATCH, config.in_channels, config.sample_size, config.sample_size)
    calls = [partial(model.eval(), noisy, 500) for model in (target.dense, network)]
    dense, pruned = interleaved(calls, ROUNDS)
    return statistics.median(after / before for before, after in zip(dense, pruned, strict=True))


def rows(sparsity: float, options: argparse.Namespace) -> list[str]:
    """The native layout nearest to a sparsity, and adaptive ones of its size, as lines of the table."""
    native = {"layout": "native", "sparsity": sparsity}
    plan = gfprune.prune("demo", dry_run=True, **native)
    params, macs = (1 - size["after"] / size["before"] for size in (plan.params, plan.macs))
    layouts: dict[str, dict[str, Any]] = {
        "native": native,
        "adaptive, the same parameters": {"sparsity": params},
        "adaptive, the same MACs": {"sparsity": macs, "budget": "macs"},
        f"adaptive, the same MACs, `--align {NATIVE_STEP}`": {
            "sparsity": macs,
            "budget": "macs",
            "align": NATIVE_STEP,
        },
    }
    found = []
    for name, layout in layouts.items():
        runs = [run(layout, options.steps, seed) for seed in range(options.seeds)]
        mean = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        cells = [f"{mean['params']:.1%}", f"{mean['macs']:.1%}", f"{mean['time']:.0%}"]
        cells += [with_range([one[key] for one in runs]) for key in ("removed", "finetuned")]
        found.append(f"| {name} | {' | '.join(cells)} |")
        print(found[-1], flush=True)
    return found


def with_range(values: list[float]) -> str:
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.44, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of finetuning")
    parser.add_argument("--out", type=Path, default=PAGES / "allocation.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, _ = losses(demo(), demo().dense, DRAWS)
    lines = ["| layout | parameters | MACs | time | after removal | after finetuning |", "|---" * 6 + "|"]
    for sparsity in options.sparsity:
        lines += rows(sparsity, options)
    seeds = "one seed" if options.seeds == 1 else f"means of {options.seeds} seeds, the range in brackets"
    body = (
        "Denoising loss of the demo on held-out images after `gfprune prune --one-shot`, and after "
        f"{options.steps} steps of `gfprune finetune`; {seeds}. "
        f"Dense: {dense:.4f}. Time: of a batch of {BATCH} on one thread, over that of the dense model.\n\n"
        + "\n".join(lines)
    )
    command = shlex.join(["python", "benchmarks/allocation.py", *sys.argv[1:]])
    print(write_page(options.out, "Widths of their own, or one ratio", command, 0, body))


if __name__ == "__main__":
    main()
