"""gfprune against its peers at equal parameters and MACs, on three networks, at three lengths of training.

    python benchmarks/quality.py --quick
    python benchmarks/quality.py
    python benchmarks/quality.py --subjects demo third --lengths 3200 16000 --seeds 0   # a part of it
    python benchmarks/quality.py --subject FOLDER --data FILE.npz                       # your own checkpoint

Peers keep the widths that their own rule gives; gfprune has to stay within their parameters and their MACs.
Every method then spends what scoring has left of one budget of gradients, counted in samples, on training.
Peers run as they are published; tuned: distilled, with the best of several optimizers and rates; and
finetuned: by `gfprune finetune` with its defaults. gfprune runs `gfprune prune --budget both` and the same
finetuning.

Writes quality.md and its plots to docs/benchmarks/, the quick form to quick/ in it, about what has been run
so far: parts add up. Runs that are done are kept beside the page and not repeated, networks in --work.
FILE.npz holds `x` and `held_out`, uint8 [N, H, W, C], as FOLDER's network takes them; the page about it goes
to --work.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from contenders import run, yardstick
from grid import FULL, QUICK, Cell, Form, Store, cells, collect, ready
from provenance import PAGES, commit
from report_quality import write_report
from subjects import TRAININGS, Place, is_trained, places_of, train_network

from gfprune_cli.errors import GfpruneError, UsageError

Filter = Callable[[Cell], bool]


@dataclass
class Grid:
    """Runs the wanted cells of a form over processes of one thread each.

    Args:
        places: the subjects, by name.
        wanted: which cells to run.
        made_at: the commit that entries name.
        results: the file that keeps what runs found.
    """

    form: Form
    places: dict[str, Place]
    work: Path
    wanted: Filter
    made_at: str
    results: Path
    jobs: int
    device: str = "cpu"
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.results, self.form, {})

    def cells(self) -> list[Cell]:
        """Wanted cells of the subjects that are there, the dense networks first, then the shortest runs."""
        listed = [cell for name in self.store.fingerprints for cell in cells(self.form, name)]
        chosen = (cell for cell in listed if cell.method == "dense" or self.wanted(cell))
        return sorted(chosen, key=lambda cell: cell.gradients)

    def run(self) -> None:
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            try:
                self.run_in(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run_in(self, pool: ProcessPoolExecutor) -> None:
        """Networks are trained while the cells of others run; trials come before what they decide."""
        pending: dict[Future, Cell | str] = {
            pool.submit(prepare, place, self.form, self.work, self.device): name
            for name, place in self.places.items()
        }
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                task, found = pending.pop(future), future.result()
                if isinstance(task, str):
                    self.store.fingerprints[task] = found
                else:
                    self.store.add(task, found | {"commit": self.made_at})
                print(task if isinstance(task, str) else summary(task, found), flush=True)
            running = set(pending.values())
            for cell in ready(self.cells(), self.store):
                if cell not in running:
                    place = self.places[cell.subject]
                    pending[pool.submit(run, cell, self.form, place, self.work, self.device)] = cell

    def look(self) -> None:
        """Take the subjects that are there as they are, and run nothing."""
        for name, place in self.places.items():
            if name not in self.form.training or is_trained(place, self.form.training[name]):
                self.store.fingerprints[name] = place.open().fingerprint


def prepare(place: Place, form: Form, work: Path, device: str) -> str:
    """Train a network that is the benchmark's own, measure it once, and return its fingerprint."""
    torch.set_num_threads(1)
    if place.name in form.training:
        train_network(place, form.training[place.name])
    target = place.open().on(torch.device(device))
    yardstick(target, form, work)
    return target.fingerprint


def summary(cell: Cell, entry: dict) -> str:
    tuning = f" {cell.optimizer} {cell.rate:g}" if cell.tuned else ""
    return (
        f"{cell.subject} {cell.method}{tuning} {cell.sparsity:g} {cell.gradients} seed {cell.seed}:"
        f" loss {entry['loss']:.4f}, {entry.get('seconds', 0):.0f} s"
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, the shortest length, less trained networks")
    add("--lengths", type=int, nargs="+", metavar="N", help="run these numbers of gradients only")
    add("--seeds", type=int, nargs="+", metavar="N", help="run these seeds only")
    add("--subjects", nargs="+", choices=("demo", *TRAININGS), metavar="NAME", help="run these networks only")
    add("--sparsities", type=float, nargs="+", metavar="S", help="run these only")
    names = FULL.methods + FULL.once
    add("--methods", nargs="+", choices=names, metavar="NAME", help="run these only: " + "; ".join(names))
    add("--page-only", action="store_true", help="run nothing, write the page from what is done")
    add("--subject", type=Path, help="a checkpoint to compare on in place of the three networks")
    add("--data", type=Path, help="its images")
    add("--work", type=Path, default=Path("build/benchmark"), help="kept between runs")
    add("--out", type=Path, help="folder of the page (default: docs/benchmarks, or quick/ in it)")
    add("--device", default="cpu", help="where runs train (default: cpu)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    return parser


def chosen_by(options: argparse.Namespace) -> Filter:
    def wanted(cell: Cell) -> bool:
        return (
            cell.gradients in (options.lengths or [cell.gradients])
            and cell.seed in (options.seeds or [cell.seed])
            and cell.sparsity in (options.sparsities or [cell.sparsity])
            and cell.method in (options.methods or [cell.method])
        )

    return wanted


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if (options.subject is None) != (options.data is None):
        parser.error("--subject and --data go together")
    form, work = (QUICK, options.work / "quick") if options.quick else (FULL, options.work / "full")
    places = places_of(work.absolute())
    folder = options.out or (PAGES / "quick" if options.quick else PAGES)
    if options.subject:
        name = options.subject.absolute().name
        places = {name: Place(name, str(options.subject.absolute()), options.data.absolute())}
        form, folder = replace(form, training={}), options.out or work / "pages" / name
    made_at = commit()
    if folder.absolute().is_relative_to(PAGES) and made_at.endswith("-dirty"):
        parser.error("pages in docs/benchmarks are made from a clean commit: commit first, or give --out")
    os.environ["OMP_NUM_THREADS"] = "1"
    work.mkdir(parents=True, exist_ok=True)
    subjects = options.subjects or list(places)
    try:
        chosen = {name: places[name] for name in subjects}
        wanted = chosen_by(options)
        folder.mkdir(parents=True, exist_ok=True)
        results = folder / "quality.jsonl"
        grid = Grid(form, chosen, work, wanted, made_at, results, options.jobs, options.device)
        if not options.page_only:
            if options.subject:
                places[name].open()
            grid.run()
        grid.places = places
        grid.look()
    except GfpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    command = "python benchmarks/quality.py" + (" --quick" if options.quick else "")
    if options.subject:
        command += f" --subject {options.subject} --data {options.data}"
    print(write_report(collect(form, list(places), grid.store), form, folder, command=command))


if __name__ == "__main__":
    main()
