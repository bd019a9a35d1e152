"""What a finetune run holds in memory, with the flags that make it less.

    python benchmarks/finetune_memory.py
    python benchmarks/finetune_memory.py --images 10000

A U-Net of some 35 M random parameters, at 32 x 32 pixels, is pruned to half in one shot and finetuned for
three steps, by each row of flags in a fresh process. Prints its peak resident set, and how far that is above
what the imports take. --images N trains once, by the defaults, on a folder of N images of 128 x 128 pixels.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import gfprune_cli as gfprune

WIDTHS, FEW = (64, 128, 256, 384), 16
ROWS = (
    "",
    "--lora 16",
    "--optimizer adafactor",
    "--ema 0",
    "--optimizer adafactor --ema 0",
    "--optimizer adafactor --ema 0 --teacher-precision bf16",
    "--lora 16 --teacher-precision bf16 --checkpointing",
)
BRIEF = "--steps 3 --batch 1 --save-every 0 --sample-every 0 --force"
RUN = """
import sys
import torch, diffusers, accelerate
from gfprune_cli.recovery import command
from gfprune_cli.cli.main import app
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
imported = status("VmRSS")
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(imported, status("VmHWM"), file=sys.stderr)
"""


def write_images(folder: Path, count: int, edge: int) -> Path:
    """Images of noise, as PNG."""
    source = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = source.integers(0, 255, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=0)
    return folder


def pruned(work: Path, edge: int) -> tuple[Path, int, int]:
    """A pruned checkpoint of random weights, and the parameters before and after."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=edge, block_out_channels=WIDTHS, norm_num_groups=8, layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(work / "dense")
    data = write_images(work / "few", FEW, edge)
    found = gfprune.prune(
        str(work / "dense"), sparsity=0.5, one_shot=True, refit=False, recover=0, draws=2,
        criterion="magnitude", data=str(data), out=work / "pruned",
    )  # fmt: skip
    return work / "pruned", found.params["before"], found.params["after"]


def peak(work: Path, model: Path, data: Path, flags: str) -> tuple[int, int]:
    """Resident bytes after the imports, and at most, of one run."""
    given = ["finetune", "--model", model, "--data", data, "--out", work / "out", *BRIEF.split()]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, given), *flags.split()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{flags}: {done.stderr[-2000:]}")
    imported, most = done.stderr.splitlines()[-1].split()
    return int(imported), int(most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="train on as many, by the defaults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        edge = 128 if options.images else 32
        model, before, after = pruned(work, edge)
        print(f"{before / 1e6:.1f} M parameters, pruned to {after / 1e6:.1f} M; {edge} x {edge} pixels\n")
        print("| flags | images | peak MB | above imports |\n|---|---|---|---|")
        data = write_images(work / "many", options.images, edge) if options.images else work / "few"
        for flags in ROWS[:1] if options.images else ROWS:
            imported, most = peak(work, model, data, flags)
            row = f"| `{flags or 'defaults'}` | {options.images or FEW} | {most / 1e6:.0f} |"
            print(f"{row} {(most - imported) / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
