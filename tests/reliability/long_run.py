"""Finetune for many steps or sample many images in this process; prints its memory along the way as JSON.

python tests/reliability/long_run.py finetune MODEL OUT STEPS
python tests/reliability/long_run.py eval MODEL REFERENCE SAMPLES
"""

import gc
import importlib
import json
import sys
from typing import Any

import psutil
import torch

import gfprune_cli
from gfprune_cli.progress import Event

POINTS = 40  # measurements of one run


class Meter:
    """Resident memory and live tensors at about `POINTS` events of one phase."""

    def __init__(self, phase: str, total: int) -> None:
        self.phase, self.every = phase, max(1, total // POINTS)
        self.process = psutil.Process()
        self.points: list[dict[str, int]] = []
        self.last = -1

    def progress(self, event: Event) -> None:
        mark = event.step // self.every
        if event.phase != self.phase or mark == self.last:
            return
        self.last = mark
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        self.points.append({"step": event.step, "bytes": self.process.memory_info().rss, "tensors": tensors})


def main(command: str, model: str, other: str, count: int) -> dict[str, Any]:
    importlib.import_module("gfprune_cli.api")
    gc.freeze()  # what imports made is looked through no more: it takes longer than the run
    meter = Meter(
        "finetune" if command == "finetune" else "sample", count if command == "finetune" else 2 * count
    )
    if command == "finetune":
        gfprune_cli.finetune(
            model, out=other, images=16, sample_steps=2, steps=count, batch=4, save_every=max(1, count // 20),
            sample_every=max(1, count // 20), progress=meter.progress,
        )  # fmt: skip
    else:
        gfprune_cli.evaluate(
            model, reference=other, samples=count, steps=2, batch=4, no_latency=True, progress=meter.progress
        )
    return {"points": meter.points, "peak": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
