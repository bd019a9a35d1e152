"""What networks are worth that take the same time: made for that time, or by a budget of MACs, or of both.

    python benchmarks/equal_time.py
    python benchmarks/equal_time.py --subjects demo --seeds 1 --speedups 1.5

For time, `prune --speedup`, which times its own networks until one is as fast. For the other budgets the
sparsity is searched at which the network of a short run is measured to be as fast as that one. All are then
timed in turns. Everything else is at its default, a recovery of 50 steps among it. Held-out loss and SSIM as
in quality.py, whose networks it takes. Nothing else may run meanwhile. Writes docs/benchmarks/equal_time.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from speedup import faster
from study import ALL_IMAGES, QUALITY_HEAD, Run, Study, cells, head, left, shares, spread, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune

SAMPLES, SAMPLE_STEPS = 64, 20
SEARCHED = 6  # sparsities that are tried
FAST: dict[str, Any] = dict(one_shot=True, refit=False, recover=0)
WAYS = ("time", "macs", "both")
CPU = torch.device("cpu")


def prune(place: Place, out: Path, seed: int, **settings: Any) -> Any:
    shared: dict[str, Any] = dict(data=str(place.data), images=ALL_IMAGES, seed=seed, device="cpu")
    return gfprune.prune(place.model, out=out, force=True, **shared, **settings)


def as_fast(place: Place, root: Path, batch: int, seed: int, budget: str, speedup: float) -> float:
    """The sparsity of a budget at which the network of a short run is so many times as fast."""
    dense, low, high = gfprune.load(place.model), 0.02, 0.98
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        done = prune(place, root / "trial", seed, budget=budget, sparsity=middle, **FAST)
        (found,) = faster([dense, gfprune.load(str(done.output))], CPU, time_batch=batch)
        if found.value < speedup:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def rows(place: Place, batch: int, speedup: float, seed: int, root: Path) -> list[Run]:
    """One network for each way, timed in one interleaved run."""
    found: list[Run] = []
    yard = Yardstick(place.open(), SAMPLES, SAMPLE_STEPS, cache=root / "dense.safetensors")
    networks = [gfprune.load(place.model)]
    for way in WAYS:
        if way == "time":
            asked: dict[str, Any] = dict(speedup=speedup, time_batch=batch)
        else:
            (reached,) = faster(networks[:2], CPU, time_batch=batch)
            asked = dict(budget=way, sparsity=as_fast(place, root, batch, seed, way, reached.value))
        made = prune(place, root / way, seed, **asked)
        networks.append(gfprune.load(str(made.output)))
        found.append({"way": way, **yard.measure(networks[-1]), **left(made)})
    for row, fast in zip(found, faster(networks, CPU, time_batch=batch), strict=True):
        row["speedup"] = fast.value
    return found


def lines(study: Study) -> Iterator[str]:
    torch.set_num_threads(1)  # in this process: nothing else may run while networks are timed
    with tempfile.TemporaryDirectory() as folder:
        for name, place in study.subjects.items():
            root = Path(folder) / name
            root.mkdir()
            for speedup in study.own.speedups:
                runs = [
                    run for seed in study.seeds for run in rows(place, study.own.batch, speedup, seed, root)
                ]
                yield from ("", f"## {name}, {speedup:g} times as fast asked")
                yield from head("made for", "parameters", "MACs", "times as fast", QUALITY_HEAD)
                for way in WAYS:
                    own = [run for run in runs if run["way"] == way]
                    fast = spread([run["speedup"] for run in own], 2)
                    yield f"| {way} | {shares(own)} | {fast} | {cells(own)} |"


if __name__ == "__main__":
    title = "Networks that take the same time"
    write_study(__file__, str(__doc__), title, lines, subjects=("demo", "second"), speedups=[1.5], batch=16)
