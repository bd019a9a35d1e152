"""What each exported artefact costs per call, pruned beside dense, on this machine's CPU.

    python benchmarks/export.py

Prunes the demo in one shot (latency does not depend on training), exports dense and pruned networks to
every format, and calls them in turn, round by round, on one thread, with one runtime in memory at a time. The
time is the CPU time of the process, so that other work on the machine counts little; the speed-up is the
median over the rounds of dense time over pruned time, with its quartiles. The last column is the speed-up
over the MAC ratio. `--folder` keeps the checkpoints and exports, and uses those that are there.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import table
from speed import EXPORTED, ONE_SHOT, TIMES, latency_gains

import gfprune_cli

PRUNED: dict[str, dict[str, Any]] = {
    "params": dict(sparsity=0.5, budget="params", align=4),
    "macs": dict(sparsity=0.5, budget="macs", align=4),
    "macs, align 16": dict(sparsity=0.5, budget="macs", align=16),
    "native": dict(sparsity=0.5, budget="params", layout="native"),
}


def main(root: Path, batches: list[int], rounds: int) -> None:
    for name, settings in PRUNED.items():
        if not (root / name).exists():
            gfprune_cli.prune("demo", out=root / name, **settings, **ONE_SHOT)
    rows = []
    for runtime in ("eager", *EXPORTED):  # OpenVINO last: its threads go on spinning, and would count
        if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
            continue
        for batch in batches:
            found = latency_gains("demo", [root / name for name in PRUNED], [runtime], [batch], rounds)
            rows += [[runtime, str(batch), name, *row.cells] for name, row in zip(PRUNED, found, strict=True)]
    print(*table(("runtime", "batch", "model", *TIMES), rows), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--folder", type=Path, help="keep checkpoints and exports here (default: nowhere)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        main(options.folder or Path(temporary), options.batches, options.rounds)
