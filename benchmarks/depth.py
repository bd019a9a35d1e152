"""What it buys to choose blocks in view of those that have gone: held-out loss, nothing trained or refitted.

    python benchmarks/depth.py
    python benchmarks/depth.py --seeds 1 --steps 300

DiTs of twelve blocks are trained here, on the images of the demo, from several seeds. Then blocks go: those
that change the output least one by one, those that are chosen together, and those of one run. Prints a table.
"""

import argparse
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from folding_networks import HELD_OUT, LOSS_DRAWS, Family, dit, images_of, one_class, trained

from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import denoising_loss
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.flow.depth import Choice, Distance, Greedy
from gfprune_cli.flow.loop import COMPARED_SAMPLES
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import silent
from gfprune_cli.structure.blocks import block_groups

BLOCKS, GONE = 12, (2, 4, 6)
STEPS = 600
WAYS = ("one by one", "together", "one run")


def chosen(way: str, names: list[str], count: int, distance: Distance) -> list[str]:
    """So many blocks that go."""
    if way == "one by one":
        alone = {name: distance(frozenset([name])) for name in names}
        return sorted(names, key=lambda name: alone[name])[:count]
    saved = lambda gone: len(gone) / len(names)  # noqa: E731
    choice = Choice({"": names}, saved, count / len(names), {"": count}, way == "one run")
    greedy = Greedy(choice, distance)
    greedy.order()
    return greedy.taken


def loss_without(gone: Collection[str], masked: MaskedModel, process: Any, draws: Draws) -> float:
    masks = {name: mask * 0 if name in gone else mask * 0 + 1 for name, mask in masked.masks.items()}
    masked.set_masks(masks)
    return denoising_loss(partial(masked.forward, masked.passing()), process, draws, LOSS_DRAWS, silent)


def trained_dit(seed: int, steps: int, work: Path) -> tuple[Any, Family, Draws, Draws]:
    """A network, from `work` if it was trained before; how it is built; draws to train and to judge on."""
    torch.manual_seed(seed)
    family = Family(partial(dit, 4, 32, BLOCKS, 1), diffusers.DDPMScheduler, steps=steps, batch=16)
    process, images = noising_process(family.scheduler()), images_of(family)
    known, held_out = (
        Draws(images[part], process.steps, seed, one_class(len(images[part])))
        for part in (slice(-HELD_OUT), slice(-HELD_OUT, None))
    )
    network = trained(f"DiT of {BLOCKS} blocks {steps} {seed}", family, process, known, work)
    return network, family, known, held_out


def rows(seed: int, steps: int, work: Path) -> dict[tuple[str, int], tuple[float, int, list[str]]]:
    """(way, blocks gone) -> held-out loss, passes that the choice took, what went; "dense" with none."""
    network, family, known, held_out = trained_dit(seed, steps, work)
    process = noising_process(family.scheduler())
    groups = block_groups(network)
    names = [group.name for group in groups]
    batch = known.batch("compare", 1, COMPARED_SAMPLES)
    noisy = process.add_noise(batch.images, batch.noise, batch.index)
    found: dict[tuple[str, int], tuple[float, int, list[str]]] = {}
    masked = MaskedModel(network, groups)
    found["dense", 0] = loss_without((), masked, process, held_out), 0, []
    for way in WAYS:
        for count in GONE:
            masked.set_masks({name: mask * 0 + 1 for name, mask in masked.masks.items()})
            times = process.timesteps(batch.index)
            distance = Distance(masked, noisy, times, batch.condition, frozenset(), len(noisy), lambda: None)
            gone = chosen(way, names, count, distance)
            found[way, count] = loss_without(gone, masked, process, held_out), distance.passes, gone
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/depth"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    runs = [rows(seed, options.steps, options.work) for seed in range(options.seeds)]
    print("| blocks that go | way | held-out loss, by seed | passes | blocks |")
    print("|---|---|---|---|---|")
    for way, count in runs[0]:
        losses = ", ".join(f"{run[way, count][0]:.4f}" for run in runs)
        passes = ", ".join(str(run[way, count][1]) for run in runs)
        gone = "; ".join(
            " ".join(sorted((name.rpartition(".")[2] for name in run[way, count][2]), key=int))
            for run in runs
        )
        print(f"| {count} | {way} | {losses} | {passes} | {gone} |")


if __name__ == "__main__":
    main()
