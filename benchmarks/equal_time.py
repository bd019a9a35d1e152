"""What networks are worth that take the same time: made for that time, or by a budget of MACs, or of both.

    python benchmarks/equal_time.py
    python benchmarks/equal_time.py --subjects demo --seeds 1 --speedups 1.5

One table of times serves all runs of a network (`analyze --times-out`). For the other budgets the sparsity is
searched at which the table gives the network that they make the time of the one made for it; all are then
timed in turns. Everything else is at its default, a recovery of 50 steps among it. Held-out loss and SSIM as
in quality.py, whose networks it takes. Writes docs/benchmarks/equal_time.md.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from chain import ALL_IMAGES, spread
from provenance import PAGES, write_page
from subjects import Place, places_of
from yardstick import Yardstick

import gfprune_cli as gfprune
from gfprune_cli.progress import silent
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.timing.budget import bench_of
from gfprune_cli.timing.stopwatch import Reading, network_seconds, times_as_fast

SAMPLES, SAMPLE_STEPS = 64, 20
SEARCHED = 6  # sparsities that are tried
FAST: dict[str, Any] = dict(one_shot=True, refit=False, recover=0)
WAYS = ("time", "macs", "both")


def prune(place: Place, out: Path, times: Path, seed: int, **settings: Any) -> Any:
    """A run whose record says what the table makes of its network; without a budget of time, 1 % of it."""
    shared: dict[str, Any] = dict(data=str(place.data), images=ALL_IMAGES, seed=seed, device="cpu")
    asked = {"speedup": 1.01, **settings}
    return gfprune.prune(place.model, out=out, force=True, times=str(times), **shared, **asked)


def as_fast(place: Place, root: Path, times: Path, seed: int, budget: str, speedup: float) -> float:
    """The sparsity of a budget at which the table predicts a speed-up."""
    low, high = 0.02, 0.98
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        done = prune(place, root / "trial", times, seed, budget=budget, sparsity=middle, **FAST)
        if done.time["predicted"]["speedup"] < speedup:
            low = middle
        else:
            high = middle
    return high


def rows(
    place: Place, times: Path, batch: int, speedup: float, seed: int, root: Path
) -> list[dict[str, Any]]:
    """One network for each way, timed in one interleaved run."""
    found: list[dict[str, Any]] = []
    subject = place.open()
    yard = Yardstick(subject, SAMPLES, SAMPLE_STEPS, cache=root / "dense.safetensors")
    networks = [gfprune.load(place.model)]
    made = prune(place, root / "time", times, seed, speedup=speedup)
    reached = made.time["predicted"]["speedup"]
    for way in WAYS:
        if way != "time":
            sparsity = as_fast(place, root, times, seed, way, reached)
            made = prune(place, root / way, times, seed, budget=way, sparsity=sparsity)
        networks.append(gfprune.load(str(made.output)))
        shares = {
            key: pair["after"] / pair["before"]
            for key, pair in (("params", made.params), ("macs", made.macs))
        }
        found.append({"way": way, **shares, **yard.measure(networks[-1])})
    device = torch.device("cpu")
    bench = bench_of(PruneRecipe(speedup=2.0, time_batch=batch), device)
    try:
        seconds = network_seconds([bench.network(network) for network in networks], device, silent)
    finally:
        bench.end()
    for row, own in zip(found, seconds[1:], strict=True):
        row["speedup"] = times_as_fast(seconds[0], own)
    return found


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| made for | parameters | MACs | times as fast | held-out loss | SSIM | fd_teacher |",
        "|---" * 7 + "|",
    ]

    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        shares = [f"{statistics.mean(run[key] for run in own):.1%}" for key in ("params", "macs")]
        fast: list[Reading] = [run["speedup"] for run in own]
        cells = [
            spread([one.value for one in fast], 2),
            *(
                spread([run[key] for run in own], digits)
                for key, digits in (("loss", 4), ("ssim", 3), ("fd_teacher", 2))
            ),
        ]
        lines.append(f"| {way} | {' | '.join(shares + cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["demo", "second"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark/full"), help="networks of quality.py"
    )
    parser.add_argument("--out", type=Path, default=PAGES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    places, lines = places_of(options.work), []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.subjects:
            root = Path(folder) / name
            root.mkdir()
            times = root / "times.json"
            gfprune.analyze(places[name].model, times_out=times, time_batch=options.batch)
            for speedup in options.speedups:
                runs = [
                    row
                    for seed in range(options.seeds)
                    for row in rows(places[name], times, options.batch, speedup, seed, root)
                ]
                lines += ["", f"## {name}, {speedup:g} times as fast asked of the table", "", *table(runs)]
                print("\n".join(lines[-7:]), flush=True)
    command = (
        f"python benchmarks/equal_time.py --subjects {' '.join(options.subjects)} --batch {options.batch}"
    )
    command += f" --seeds {options.seeds} --speedups {' '.join(f'{one:g}' for one in options.speedups)}"
    title = "Networks that take the same time"
    seeds = f"0 to {options.seeds - 1}"
    print(write_page(options.out / "equal_time.md", title, command, seeds, "\n".join(lines)))


if __name__ == "__main__":
    main()
