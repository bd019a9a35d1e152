"""What the one-line command gives: the README's picture and its first table.

    python benchmarks/showcase.py

`gfprune prune --model demo --sparsity S` with its defaults, no data, for two sparsities of both parameters
and MACs. Samples come from the same noise in every row, none left out. Time is that of a batch of 16, the
least of interleaved rounds on one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import PAGES, table, write_page
from torch import nn
from yardstick import Yardstick, demo, samples

import gfprune_cli as gfprune
from gfprune_cli.evaluation.consistency import unit_range

SPARSITIES = (0.5, 0.75)
COLUMNS = 16
SAMPLES, SAMPLE_STEPS = 128, 50
BATCH, ROUNDS = 16, 15
SCALE = 2


def pruned(sparsity: float, folder: Path) -> dict[str, Any]:
    """The numbers of one command, and the network that it wrote."""
    result = gfprune.prune("demo", sparsity=sparsity, out=folder / str(sparsity))
    return {"result": result, "network": gfprune.load(str(result.output))}


@torch.no_grad()
def times(networks: Sequence[nn.Module], size: int) -> list[float]:
    """Seconds of a batch for each network: the least of interleaved rounds."""
    x, timesteps = torch.zeros(BATCH, 3, size, size), torch.zeros(BATCH, dtype=torch.long)
    found = [float("inf")] * len(networks)
    for _ in range(ROUNDS):
        for number, network in enumerate(networks):
            start = time.perf_counter()
            network(x, timesteps)
            found[number] = min(found[number], time.perf_counter() - start)
    return found


def picture(rows: Sequence[torch.Tensor], path: Path) -> None:
    """One row of samples for each network, enlarged."""
    pixels = [(unit_range(row[:COLUMNS], low=-1, high=1) * 255).round().to(torch.uint8) for row in rows]
    strips = [np.concatenate(list(row.permute(0, 2, 3, 1).numpy()), 1) for row in pixels]
    image = Image.fromarray(np.concatenate(strips, 0))
    image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST).save(path)


def sizes(result: Any, when: str) -> list[str]:
    """Parameters, MACs and bytes as cells."""
    return [f"{result.params[when]:,}", f"{result.macs[when]:,}", f"{result.bytes[when]:,} bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the page")
    parser.add_argument("--picture", type=Path, default=PAGES.parent / "samples.png")
    options = parser.parse_args()
    subject = demo()
    yardstick = Yardstick(subject, SAMPLES, SAMPLE_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        runs = [pruned(sparsity, Path(folder)) for sparsity in SPARSITIES]
    measured = [yardstick.measure(run["network"]) for run in runs]
    torch.set_num_threads(1)
    dense_time, *pruned_times = times([subject.dense, *(run["network"] for run in runs)], 32)
    picture(
        [yardstick.images, *(samples(subject, run["network"], COLUMNS, SAMPLE_STEPS) for run in runs)],
        options.picture,
    )
    head = (
        *("`gfprune prune --model demo`", "parameters", "MACs per image", "weight file", "time of a batch"),
        *("SSIM to the dense model", "seconds"),
    )
    rows = [["dense", *sizes(runs[0]["result"], "before"), f"{dense_time * 1e3:.1f} ms", "1", ""]]
    for sparsity, run, found, seconds in zip(SPARSITIES, runs, measured, pruned_times, strict=True):
        took = f"{seconds * 1e3:.1f} ms ({dense_time / seconds:.2f}x)"
        result = run["result"]
        quality = [took, f"{found['ssim']:.3f}", f"{result.seconds:.0f}"]
        rows.append([f"`--sparsity {sparsity}`", *sizes(result, "after"), *quality])
    title, command = "What the one-line command gives", "python benchmarks/showcase.py"
    write_page(options.out / "showcase.md", title, command, 0, "\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
