"""gfprune against its peers on a GPU, in one run of under 9 minutes.

    python benchmarks/gpu.py                        # on CUDA: docs/benchmarks/gpu.md, gpu.json
    python benchmarks/gpu.py --parts speed          # what is asked of --speedup, and measured, alone
    python benchmarks/gpu.py --parts large          # SDXL's size, in a run of its own; needs 80 GB
    python benchmarks/gpu.py --toy --out toy        # tiny networks on the CPU, to see that it works

The first part trains a dense U-Net of google/ddpm-cifar10-32's architecture (35.7 M parameters) on emoji,
prunes it to what Torch-Pruning leaves when a quarter or half of the channels of every layer go (44 % and
75 % of the parameters), finetunes, evaluates, and measures the cost of scoring, latency and memory. The
second asks for speed-ups of a wide network, eager and compiled. `--minutes` sizes every phase: dense training
by the clock, the others by the speed that was measured. Both files are written anew after every number; parts
that are not run stay in them.
"""

import argparse
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_budgets import measure_large, measure_speed
from gpu_networks import CIFAR10
from gpu_run import Clock, Form, Run
from large import SUBJECTS, Subject, stable_diffusion
from provenance import PAGES, header
from report_gpu import PARTS, Board
from study import ALL_IMAGES

FULL = Form(
    network=CIFAR10,
    images=ALL_IMAGES,
    ratios={"44 %": 0.25, "75 %": 0.5},
    dense_steps=float("inf"),
    batch=256,
    gradients=None,
    scoring=512,
    prune={},
    cost_draws=64,
    cost_repeats=3,
    samples=512,
    sample_steps=20,
    batches=(1, 256),
    budgets=tuple(
        (runtime, batch, asked)
        for batch in (64, 1)
        for runtime in ("compile", "eager")
        for asked in (1.5, 2.0)
    ),
    width=512,
    large=SUBJECTS["sdxl"],
)
TINY = dict(
    sample_size=16,
    layers_per_block=1,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
TOY = Form(
    network=CIFAR10 | TINY,
    images=24,
    ratios={"half of the channels": 0.5},
    dense_steps=2,
    batch=4,
    gradients=128,
    scoring=8,
    prune=dict(one_shot=True, draws=4),
    cost_draws=4,
    cost_repeats=1,
    samples=4,
    sample_steps=2,
    batches=(1, 2),
    budgets=(("eager", 1, 1.1), ("eager", 1, 100.0)),
    width=32,
    large=Subject("SD 1.5 at a tenth of its width", lambda: stable_diffusion(32, 8), 4),
)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny networks; runs on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:2]))
    parser.add_argument("--minutes", type=float, default=8.5, help="that the run may take")
    parser.add_argument("--out", type=Path, help="folder of gpu.md and gpu.json")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 1 if something could not be measured for another reason than time."""
    options = arguments(given)
    clock = Clock(60 * options.minutes)
    out = options.out or (Path("build/gpu-toy") if options.toy else PAGES)
    if not options.toy and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here; --toy runs on the CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    warnings.filterwarnings("ignore")
    form, device = (TOY, torch.device("cpu")) if options.toy else (FULL, torch.device("cuda"))
    asked = ["--toy"] if options.toy else ["--minutes", f"{options.minutes:g}"]
    command = shlex.join(["python", "benchmarks/gpu.py", "--parts", *options.parts, *asked])
    with tempfile.TemporaryDirectory() as folder:
        head = header(command, options.seed).splitlines()
        board = Board(out, form.tables(), head, options.parts)
        run = Run(form, Path(folder), board, device, clock, options.seed)
        measures = {"quality": Run.execute, "speed": measure_speed, "large": measure_large}
        for part in options.parts:
            measures[part](run)
    print(board.text())
    print(board.page)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
