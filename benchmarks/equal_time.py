"""What networks are worth that take the same time: made for that time, or by a budget of MACs, or of both.

    python benchmarks/equal_time.py
    python benchmarks/equal_time.py --subjects demo --seeds 1 --speedups 1.5

One table of times serves all runs of a network (`analyze --times-out`). For the other budgets the sparsity is
searched at which the table gives the network that they make the time of the one made for it; all are then
timed in turns. Everything else is at its default, a recovery of 50 steps among it. Held-out loss and SSIM as
in quality.py, whose networks it takes. Writes docs/benchmarks/equal_time.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study import ALL_IMAGES, QUALITY_HEAD, Run, Study, cells, head, left, shares, spread, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune
from gfprune_cli.progress import silent
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.timing.budget import bench_of
from gfprune_cli.timing.stopwatch import network_seconds, times_as_fast

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


def rows(place: Place, times: Path, batch: int, speedup: float, seed: int, root: Path) -> list[Run]:
    """One network for each way, timed in one interleaved run."""
    found: list[Run] = []
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
        found.append({"way": way, **yard.measure(networks[-1]), **left(made)})
    device = torch.device("cpu")
    bench = bench_of(PruneRecipe(speedup=2.0, time_batch=batch), device)
    try:
        seconds = network_seconds([bench.network(network) for network in networks], device, silent)
    finally:
        bench.end()
    for row, own in zip(found, seconds[1:], strict=True):
        row["speedup"] = times_as_fast(seconds[0], own)
    return found


def lines(study: Study) -> Iterator[str]:
    torch.set_num_threads(1)  # in this process: nothing else may run while networks are timed
    batch = study.own.batch
    with tempfile.TemporaryDirectory() as folder:
        for name, place in study.subjects.items():
            root = Path(folder) / name
            root.mkdir()
            times = root / "times.json"
            gfprune.analyze(place.model, times_out=times, time_batch=batch)
            for speedup in study.own.speedups:
                runs = [run for seed in study.seeds for run in rows(place, times, batch, speedup, seed, root)]
                yield from ("", f"## {name}, {speedup:g} times as fast asked of the table")
                yield from head("made for", "parameters", "MACs", "times as fast", QUALITY_HEAD)
                for way in WAYS:
                    own = [run for run in runs if run["way"] == way]
                    fast = spread([run["speedup"].value for run in own], 2)
                    yield f"| {way} | {shares(own)} | {fast} | {cells(own)} |"


if __name__ == "__main__":
    title = "Networks that take the same time"
    write_study(__file__, str(__doc__), title, lines, subjects=("demo", "second"), speedups=[1.5], batch=16)
