"""Where do the defaults of `gfprune finetune` come from? Its settings at equal gradients, one by one.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --subject FOLDER --data FILE.npz --pruned CHECKPOINT --gradients 3200

One pruned checkpoint is finetuned with each optimizer at several peak rates. Around the best of these, by the
loss on images that no run has seen, batch, averaging and losses change one at a time. Gradients are counted
in samples, so a larger batch takes fewer steps. Without --pruned the subject is pruned first, to a quarter of
its parameters and MACs. FILE.npz holds `x` and `held_out`, uint8 [N, H, W, C].

Writes docs/benchmarks/recovery.md. Runs that are done are kept in --work and not repeated.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import PAGES, flags, write_page
from study import ALL_IMAGES, QUALITY_HEAD, head, once
from yardstick import Subject, Yardstick, demo, subject

import gfprune_cli as gfprune
from gfprune_cli.recipes.finetune import FinetuneRecipe

Settings = dict[str, Any]
Numbers = dict[str, float]
SAMPLES, SAMPLE_STEPS = 128, 20  # drawn from every network
PRUNING: Settings = dict(sparsity=0.75, recover=0)
RATES = {"adamw": (5e-4, 1.5e-3, 3e-3), "muon": (1e-3, 2e-3, 3e-3), "soap": (3e-3, 4e-3, 6e-3)}
FACTORS: dict[str, list[Settings]] = {
    "Batch": [{"batch": 4}, {"batch": 8}, {"batch": 16}, {"batch": 32}],
    "Average of the weights": [{"ema": 0.9999}, {"ema": 0.9}, {"ema": 0.0}],
    "Noise levels": [{"image_weight": 20.0}, {"image_weight": 5.0}, {"image_weight": 0.0}, {"min_snr": 5.0}],
    "Losses": [
        {"distill": 0.9, "denoise": 0.1},
        {"distill": 1.0, "denoise": 0.0},
        {"distill": 0.0, "denoise": 1.0},
        {"distill": 0.9, "denoise": 0.1, "features": 0.0},
    ],
    "Draws of noise levels": [{"timesteps": name} for name in ("adaptive", "stratified", "uniform")],
}
COLUMNS = ("loss", "ssim", "fd_teacher", "seconds")


@dataclass
class Bench:
    """Finetuned networks of one pruned checkpoint, measured.

    Args:
        seeds: how many runs stand behind each row.
        store: a folder for the numbers of runs that are done.
    """

    target: Subject
    pruned: Path
    yardstick: Yardstick
    seeds: int
    store: Path

    def __post_init__(self) -> None:
        record = (self.pruned / "gfprune.json").read_bytes()  # the dense weights, the recipe, what was kept
        self.digest = hashlib.sha256(self.target.fingerprint.encode() + record).hexdigest()

    def rows(self, gradients: int, settings: Settings) -> Numbers:
        """Means over the seeds."""
        runs = [self.run(gradients, settings, seed) for seed in range(self.seeds)]
        return {name: statistics.mean(run[name] for run in runs) for name in runs[0]}

    def run(self, gradients: int, settings: Settings, seed: int) -> Numbers:
        recipe = FinetuneRecipe(model="m", seed=seed, **settings)
        chosen = settings | {"steps": gradients // recipe.batch, "seed": seed}
        key = json.dumps([self.digest, recipe.document() | chosen], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return dict(once(self.store / f"{name}.json", lambda: self.measure(chosen)))

    def measure(self, settings: Settings) -> Numbers:
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "out", time.perf_counter()
            data: Settings = dict(data=str(self.target.data), images=ALL_IMAGES)
            gfprune.finetune(self.pruned, out=out, save_every=0, sample_every=0, **data, **settings)
            seconds = time.perf_counter() - start
            found = {**self.yardstick.measure(gfprune.load(out)), "seconds": seconds}
        print(settings, *(f"{name} {found[name]:.4g}" for name in COLUMNS), flush=True)
        return {name: found[name] for name in COLUMNS}


def study(bench: Bench, gradients: int) -> list[str]:
    """All tables of one length."""
    rates = [{"optimizer": name, "learning_rate": rate} for name, peaks in RATES.items() for rate in peaks]
    lines = [f"## {gradients} gradients", *table("optimizer and peak rate", bench, gradients, {}, rates)]
    best = min(rates, key=lambda settings: bench.rows(gradients, settings)["loss"])
    for name, changes in FACTORS.items():
        lines += ["", f"{name}, with `{flags(best)}`:", *table(name.lower(), bench, gradients, best, changes)]
    return lines


def table(title: str, bench: Bench, gradients: int, base: Settings, changes: list[Settings]) -> list[str]:
    lines = head(title, QUALITY_HEAD, "seconds")
    for change in changes:
        found = bench.rows(gradients, base | change)
        cells = [f"{found['loss']:.4f}", f"{found['ssim']:.3f}", f"{found['fd_teacher']:.1f}"]
        lines.append(f"| `{flags(change)}` | {' | '.join(cells)} | {found['seconds']:.0f} |")
    return lines


def introduction(bench: Bench) -> list[str]:
    before = bench.yardstick.measure(gfprune.load(bench.pruned))
    values = f"loss {before['loss']:.4f}, SSIM {before['ssim']:.3f}, fd_teacher {before['fd_teacher']:.1f}"
    return [
        f"{bench.target.name}, pruned to {before['params']:,} parameters, finetuned by `gfprune finetune` on",
        f"its training images; means over {bench.seeds} seed(s). Pruned: {values}.",
        f"Dense: loss {float(bench.yardstick.losses[0]):.4f}.",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="demo", help="demo, or the folder of a dense checkpoint")
    parser.add_argument("--data", type=Path, help="its images, .npz; not for the demo")
    parser.add_argument("--pruned", type=Path, help="what is finetuned (default: pruned here)")
    parser.add_argument("--gradients", type=int, nargs="+", default=[3200, 16_000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/recovery"))
    parser.add_argument("--out", type=Path, default=PAGES / "recovery.md")
    options = parser.parse_args()
    if (options.subject == "demo") != (options.data is None):
        parser.error("--data belongs to a --subject of your own")
    return options


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(options.subject)
    target = demo() if options.data is None else subject(folder.name, str(folder), options.data)
    options.work.mkdir(parents=True, exist_ok=True)
    pruned = options.pruned or options.work / f"pruned-{target.name}"
    if not pruned.exists():
        gfprune.prune(target.model, out=pruned, data=str(target.data), images=ALL_IMAGES, **PRUNING)
    yardstick = Yardstick(target, SAMPLES, SAMPLE_STEPS)
    bench = Bench(target, pruned, yardstick, options.seeds, options.work)
    body = introduction(bench)
    seeds = f"0 to {options.seeds - 1}" if options.seeds > 1 else 0
    command = shlex.join(["python", "benchmarks/recovery.py", *sys.argv[1:]])
    for gradients in options.gradients:
        body += ["", *study(bench, gradients)]
        print(write_page(options.out, "Settings of finetuning", command, seeds, "\n".join(body)))


if __name__ == "__main__":
    main()
