"""What `prune --speedup` is asked for, against what the networks that it makes take.

    python benchmarks/speedup.py                          # in eager PyTorch and ONNX Runtime; needs 14 GB
    python benchmarks/speedup.py --networks demo random   # 10 minutes
    python benchmarks/speedup.py --device cuda --precision bf16 --runtimes eager --batches 64 1

Writes `speedup.md` into docs/benchmarks, `speedup-cuda.md` on a card; parts add up, in a file beside it.
Networks are pruned in one shot, without refit and recovery, since time does not depend on weights. What the
run measured itself stands beside a second measurement, made when all is written, of the checkpoint as it is
on disk, in turns with the dense one.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from large import stable_diffusion
from provenance import PAGES, commit, table, write_page
from speed import ONE_SHOT, random_pipeline
from torch import nn

import gfprune_cli
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import silent
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.device import device_name
from gfprune_cli.timing.budget import bench_of
from gfprune_cli.timing.stopwatch import Reading, network_seconds, times_as_fast

SPEEDUPS = (1.25, 1.5, 2.0, 3.0)
CLOSE = 0.03  # of what was asked: the aim
LARGE: dict[str, Any] = dict(images=4, draws=4)  # of what takes seconds for a sample
NETWORKS = ("demo", "random", "sd15")


@dataclass(frozen=True)
class Sizes:
    """What keeps a device busy: the width of the second network, and the latents of the third."""

    width: int
    latents: int


SIZES = {"cpu": Sizes(64, 16), "cuda": Sizes(512, 64)}
TEXT = """*First try* is what the table of times alone proposes, before the loop closes. *Measured* is by the
run when it chose, *written* of the checkpoint on disk, afterwards; in brackets quartiles of the turns.
*Share* is what was gained of what the multiply-accumulates promise. `random` is a U-Net of {width} to
{widest} channels, `sd15` one of the shape of Stable Diffusion 1.5 on {latents} x {latents} latents; both have
random weights.

"""
PUBLISHED = """
Published, asked and achieved: HALP 1.82 and 1.60 (ResNet-50; -12 %), LayerMerge 1.72 and 1.27 (DDPM CIFAR-10
U-Net; -26 %).
"""


@dataclass(frozen=True)
class Row:
    """One prune run; `time` and `mac_ratio` are None where the speed-up is out of reach.

    `made` is the commit and the machine.
    """

    network: str
    runtime: str
    batch: int
    asked: float
    time: Any = None
    mac_ratio: float | None = None
    written: Reading | None = None
    why: str = ""
    made: str = ""

    @property
    def place(self) -> tuple[int, str, int, float]:
        """Where it stands in the table: no two rows have one."""
        return NETWORKS.index(self.network), self.runtime, self.batch, self.asked

    @property
    def missed(self) -> float | None:
        """By how much, relative to what was asked."""
        return None if self.written is None else self.written.value / self.asked - 1


def asked_rows(
    model: str, name: str, runtime: str, batch: int, speedups: Sequence[float], root: Path, **place: Any
) -> list[Row]:
    """Prune for each speed-up, and time what was written.

    Args:
        place: where it is timed, and other options of `prune`.
    """
    rows = []
    for asked in speedups:
        out = root / f"{Path(model).name}-{runtime}-{batch}-{asked:g}"
        settings = ONE_SHOT | dict(speedup=asked, runtime=runtime, time_batch=batch) | place
        try:
            done = gfprune_cli.prune(model, out=out, force=True, **settings)
        except UsageError as error:
            rows.append(Row(name, runtime, batch, asked, why=str(error)))
            continue
        ratio = done.macs["before"] / done.macs["after"]
        rows.append(
            Row(name, runtime, batch, asked, done.time, ratio, written(model, out, runtime, batch, place))
        )
    return rows


def written(model: str, out: Path, runtime: str, batch: int, place: Any) -> Reading:
    """How many times as fast a checkpoint is as the dense one."""
    device, precision = torch.device(place.get("device", "cpu")), place.get("precision")
    networks = (gfprune_cli.load(folder) for folder in (model, out))  # one in memory at a time
    return faster(networks, device, runtime=runtime, time_batch=batch, precision=precision)[0]


def faster(networks: Iterable[nn.Module], device: torch.device, **where: Any) -> list[Reading]:
    """How many times as fast as the first each of the others is, in turns; `where` are options of `prune`."""
    bench = bench_of(PruneRecipe(speedup=2.0, **where), device)
    try:
        dense, *others = network_seconds([bench.network(one) for one in networks], device, silent)
    finally:
        bench.end()
    return [times_as_fast(dense, seconds) for seconds in others]


def network_folder(name: str, root: Path, seed: int, sizes: Sizes) -> str:
    """The demo, a small U-Net, or one of the shape of Stable Diffusion 1.5; both of random weights."""
    if name == "demo":
        return name
    if name == "random":
        return str(random_pipeline(root / name, sizes.width, seed))
    torch.manual_seed(seed)
    stable_diffusion(320, sizes.latents).save_pretrained(root / name / "unet")
    DDPMScheduler().save_pretrained(root / name / "scheduler")
    return str(root / name / "unet")


def rows_table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        asked = [row.network, row.runtime, str(row.batch), f"{row.asked:g}"]
        if row.time is None or row.written is None or row.mac_ratio is None:
            cells.append([*asked, "", "", row.why.partition(": try")[0], "", "", ""])
            continue
        found, first = row.written, row.time["trials"][0]
        cells.append(
            [
                *asked,
                f"{first['measured']:.2f} for {first['predicted']:.2f}",
                f"{row.time['measured']['speedup']:.2f}",
                f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]",
                f"{row.missed:+.1%}",
                f"{row.mac_ratio:.2f}",
                f"{found.value / row.mac_ratio:.2f}",
            ]
        )
    head = (
        *("network", "runtime", "batch", "asked", "first try: measured for predicted", "measured"),
        *("written [quartiles]", "off", "MAC gain", "share"),
    )
    return "\n".join(table(head, cells))


def verdict(rows: Sequence[Row]) -> str:
    """How many rows are as near as is aimed at."""
    missed = [abs(row.missed) for row in rows if row.missed is not None]
    near = sum(one <= CLOSE for one in missed)
    return f"\n\n{near} of {len(missed)} networks are within {CLOSE:.0%} of what was asked."


def main(given: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--speedups", nargs="+", type=float, default=list(SPEEDUPS))
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and ONNX Runtime")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    made = f"{commit()} on {device_name(torch.device(options.device))}"
    options.out.mkdir(parents=True, exist_ok=True)
    place = {"device": options.device, "seed": options.seed}
    place |= {"precision": options.precision} if options.precision else {}
    kept = options.out / f"speedup-{options.device}.json"
    rows = read_rows(kept)
    sizes = SIZES[options.device]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in options.networks:
            model = network_folder(name, root, options.seed, sizes)
            slow = name == "sd15" and options.device == "cpu"
            speedups, batches = ([1.5], [1]) if slow else (options.speedups, options.batches)
            asked = place | (LARGE if name == "sd15" else {})
            for runtime in options.runtimes:
                for batch in batches:
                    found = asked_rows(model, name, runtime, batch, speedups, root, **asked)
                    rows |= {row.place: replace(row, made=made) for row in found}
                    kept.write_text(json.dumps([asdict(row) for row in rows.values()]))
                    print(rows_table(found), flush=True)
                    page(options, list(rows.values()))
    return page(options, list(rows.values()))


def read_rows(path: Path) -> dict[Any, Row]:
    """The rows of earlier runs, by their places."""
    rows = [Row(**kept) for kept in json.loads(path.read_text())] if path.exists() else []
    found = [replace(row, written=row.written and Reading(**row.written)) for row in rows]
    return {row.place: row for row in found}


def page(options: argparse.Namespace, rows: Sequence[Row]) -> Path:
    """The page of all rows that there are."""
    cpu, sizes = options.device == "cpu", SIZES[options.device]
    command = shlex.join(["python", "benchmarks/speedup.py", *([] if cpu else ["--device", options.device])])
    text = TEXT.format(width=sizes.width, widest=2 * sizes.width, latents=sizes.latents)
    rows = sorted(rows, key=lambda row: row.place)
    made: dict[str, list[str]] = {}
    for row in rows:
        made.setdefault(row.made, []).append(row.network)
    where = "; ".join(f"{', '.join(dict.fromkeys(names))}: {at}" for at, names in made.items())
    body = f"{text}{rows_table(rows)}{verdict(rows)}\n\nRows were made at: {where}.\n{PUBLISHED}"
    name = "speedup.md" if cpu else "speedup-cuda.md"
    return write_page(options.out / name, "Speed-up asked and measured", command, options.seed, body)


if __name__ == "__main__":
    print(main())
