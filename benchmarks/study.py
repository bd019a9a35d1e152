"""What the studies of settings share: their flags, processes of one thread, means over seeds, and a page."""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from provenance import PAGES, write_page
from subjects import Place, places_of

ALL_IMAGES = 10**6
FULL = Path("build/benchmark/full")  # where `quality.py` leaves its networks
QUALITY = {"loss": 4, "ssim": 3, "fd_teacher": 2}  # numbers of a network, and their digits
QUALITY_HEAD = "held-out loss | SSIM | fd_teacher"
Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The options of one study, its networks by name, and its processes.

    Args:
        own: options of this study alone.
    """

    subjects: dict[str, Place]
    seeds: range
    work: Path
    own: argparse.Namespace
    pool: ProcessPoolExecutor

    def start(
        self, measure: Callable[..., Run], *given: Any, seeds: range | None = None
    ) -> Callable[[], list[Run]]:
        """`measure(*given, seed)` for every seed, each in a process of one thread; what waits for them."""
        futures = [self.pool.submit(measure, *given, seed) for seed in seeds or self.seeds]
        return lambda: [future.result() for future in futures]


def write_study(
    file: str,
    doc: str,
    title: str,
    lines: Callable[[Study], Iterable[str]],
    *,
    subjects: tuple[str, ...] = ("demo", "second", "third"),
    work: Path = FULL,
    **flags: Any,
) -> None:
    """Parse the command line, print the lines as they come, and write them to the page of the script's name.

    Args:
        subjects, work: defaults of `--subjects` and `--work`.
        flags: defaults of the study's own flags; lists take several values.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=list(subjects))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=work, help="of networks and what is kept of them")
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    for name, value in flags.items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        parser.add_argument(f"--{name}", type=kind, nargs="+" if several else None, default=value)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    places = places_of(options.work)
    found: list[str] = []
    with ProcessPoolExecutor(
        options.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        chosen = {name: places[name] for name in options.subjects}
        for line in lines(Study(chosen, range(options.seeds), options.work, options, pool)):
            found.append(line)
            print(line, flush=True)
    script = Path(file)
    command = shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])
    path = options.out / f"{script.stem}.md"
    print(write_page(path, title, command, f"0 to {options.seeds - 1}", "\n".join(found)))


def once(path: Path, measured: Callable[[], Any]) -> Any:
    """What is kept at `path`: numbers, by name or alone."""
    if not path.exists():
        path.write_text(json.dumps(measured()))
    return json.loads(path.read_text())


def head(*columns: str) -> list[str]:
    """The first lines of a table; a column may hold several, with bars between them."""
    line = f"| {' | '.join(columns)} |"
    return ["", line, "|---" * (line.count("|") - 1) + "|"]


def with_range(mean: float, values: Sequence[float], digits: int) -> str:
    """A mean, and the lowest and highest of several values behind it."""
    shown = f"{mean:.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def spread(values: list[float], digits: int) -> str:
    """The mean over seeds, with their range."""
    return with_range(statistics.mean(values), values, digits)


def cells(runs: list[Run], digits: dict[str, int] | None = None) -> str:
    """Numbers over seeds, as cells of one row; by default those of `QUALITY`."""
    return " | ".join(spread([run[key] for run in runs], count) for key, count in (digits or QUALITY).items())


def left(result: Any) -> dict[str, float]:
    """The shares of parameters and MACs that a pruning run left."""
    return {key: getattr(result, key)["after"] / getattr(result, key)["before"] for key in ("params", "macs")}


def shares(runs: list[Run]) -> str:
    """What is left of parameters and MACs, as two cells."""
    return " | ".join(f"{statistics.mean(run[key] for run in runs):.1%}" for key in ("params", "macs"))
