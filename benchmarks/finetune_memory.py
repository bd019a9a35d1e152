"""What a finetune run holds in memory, with the flags that make it less.

    python benchmarks/finetune_memory.py
    python benchmarks/finetune_memory.py --images 10000

A U-Net of 40.8 M random parameters, at 32 x 32 pixels, is pruned in one shot and finetuned for three steps,
by each row of flags in a fresh process. Prints its peak resident set, and how far that is above what the
imports take. --images N trains once, by the defaults, a small U-Net on a folder of N images of 128 x 128
pixels. Reported losses are taken on fewer draws than usual.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from own_process import in_a_process
from PIL import Image

import gfprune_cli as gfprune

FEW = 16
LARGE: dict[str, Any] = dict(sample_size=32, block_out_channels=(64, 128, 256, 384))
SMALL: dict[str, Any] = dict(sample_size=128, block_out_channels=(16, 32, 32, 32))
SHAPE: dict[str, Any] = dict(
    norm_num_groups=8,
    layers_per_block=2,
    down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
    up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
)
PRUNING: dict[str, Any] = dict(
    sparsity=0.5, one_shot=True, refit=False, recover=0, draws=2, criterion="magnitude"
)
ROWS = (
    "",
    "--optimizer muon",
    "--lora 16",
    "--optimizer adafactor",
    "--optimizer muon --ema 0",
    "--optimizer adafactor --ema 0",
    "--optimizer adafactor --ema 0 --teacher-precision bf16",
    "--lora 16 --teacher-precision bf16",
)
BRIEF = "--steps 3 --batch 1 --save-every 0 --sample-every 0 --force"
RUN = """
import torch, diffusers, accelerate, peft
from gfprune_cli.cli.main import app
from gfprune_cli.recovery import command, job
job.REPORT_DRAWS = 4
imported = status("VmRSS")
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([imported, status("VmHWM")]))
"""


def write_images(folder: Path, count: int, edge: int) -> Path:
    """Images of noise, as PNG."""
    source = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = source.integers(0, 255, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=0)
    return folder


def make_pruned(work: Path, network: dict[str, Any]) -> Path:
    """A pruned checkpoint of random weights, kept in `work`."""
    out = work / "pruned"
    if not out.exists():
        torch.manual_seed(0)
        DDPMPipeline(UNet2DModel(**SHAPE, **network), DDPMScheduler()).save_pretrained(work / "dense")
        data = write_images(work / "few", FEW, network["sample_size"])
        gfprune.prune(str(work / "dense"), data=str(data), out=out, **PRUNING)
    return out


def peak(work: Path, data: Path, flags: str) -> tuple[int, int]:
    """Resident bytes after the imports, and at most, of one run."""
    given = ["finetune", "--model", work / "pruned", "--data", data, "--out", work / "out", *BRIEF.split()]
    imported, most = in_a_process(RUN, *given, *flags.split(), cache=work / "cache")
    return imported, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="train on as many, by the defaults")
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/memory"))
    options = parser.parse_args()
    network = SMALL if options.images else LARGE
    work, edge = options.work / str(network["sample_size"]), network["sample_size"]
    pruned = make_pruned(work, network)
    numbers = [
        sum(p.numel() for p in gfprune.load(folder).parameters()) for folder in (work / "dense", pruned)
    ]
    sizes = " and pruned ".join(f"{number / 1e6:.1f} M" for number in numbers)
    print(f"Parameters: dense {sizes}; {edge} x {edge} pixels\n")
    print("| flags | images | peak MB | above imports |\n|---|---|---|---|", flush=True)
    data = write_images(work / "many", options.images, edge) if options.images else work / "few"
    for flags in ROWS[:1] if options.images else ROWS:
        imported, most = peak(work, data, flags)
        row = f"| `{flags or 'defaults'}` | {options.images or FEW} | {most / 1e6:.0f} |"
        print(f"{row} {(most - imported) / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
