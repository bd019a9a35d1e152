"""Tables of `gpu.py`: what is known so far, written after every number; a killed run keeps what it has."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAME = "gpu"
NOT_MEASURED = "not measured"
NO_FIGURE = "–"  # the row has no such number
DENSE = "dense"
METHODS = {"gfprune": "gfprune", "taylor": "Torch-Pruning, Taylor", "diff-pruning": "Diff-Pruning"}
PEERS = tuple(name for name in METHODS if name != "gfprune")
UNIFORM = "Torch-Pruning widths"  # what both peers leave, whatever their scores


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, the name of its number, and how that is written."""

    head: str
    key: str
    text: Callable[[float], str]


@dataclass(frozen=True)
class Table:
    """A table whose rows are known before anything is measured."""

    key: str
    title: str
    note: str
    first: str
    rows: Sequence[str]
    columns: Sequence[Column]

    def lines(self, cells: Mapping[str, Mapping[str, float | None]]) -> list[str]:
        """Markdown; every number that is missing is said to be."""
        heads = [self.first, *(column.head for column in self.columns)]
        lines = [f"## {self.title}", "", self.note, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in self.rows:
            found = cells.get(row, {})
            texts = [cell(found, column) for column in self.columns]
            lines.append(f"| {' | '.join([row, *texts])} |")
        return lines


def cell(found: Mapping[str, float | None], column: Column) -> str:
    if column.key not in found:
        return NOT_MEASURED
    value = found[column.key]
    return NO_FIGURE if value is None else column.text(value)


def number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def scaled(divisor: float, digits: int) -> Callable[[float], str]:
    return lambda value: f"{value / divisor:.{digits}f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def row(method: str, label: str) -> str:
    """The name of a row: a method, and the share of the parameters that is gone."""
    return f"{METHODS.get(method, method)}, {label}"


def quality_table(labels: Sequence[str]) -> Table:
    rows = [DENSE, *(row(method, label) for label in labels for method in METHODS)]
    columns = [
        Column("parameters", "params share", percent),
        Column("MACs", "macs share", percent),
        Column("gradients", "gradients", number(0)),
        Column("held-out loss", "loss", number(4)),
        Column("SSIM to dense", "ssim", number(3)),
        Column("fd_teacher", "fd_teacher", number(2)),
        Column("pruning, s", "prune seconds", number(1)),
        Column("finetuning, s", "finetune seconds", number(1)),
    ]
    note = (
        "gfprune keeps at most the parameters and the MACs that the peers keep, and all spend the same "
        "gradients, counted in samples. gfprune is `gfprune prune --budget both --recover 0` and `gfprune "
        "finetune`; peers are finetuned by it too: distilled, with its defaults. Numbers are those of "
        "`gfprune eval`."
    )
    return Table("quality", "Quality", note, "network", rows, columns)


def scoring_table(rows: Sequence[str]) -> Table:
    columns = [
        Column("seconds", "seconds", number(3)),
        Column("of one gradient", "gradients", lambda value: f"{value:.2f}x"),
        Column("memory above the weights, MiB", "rise", scaled(1 << 20, 0)),
        Column("of one gradient's", "rises", lambda value: f"{value:.2f}x"),
        Column("error of the product", "error", lambda value: f"{value:.0e}"),
    ]
    note = (
        "Scoring of the dense network as `gfprune prune` does it: float32, deterministic, in chunks. One "
        "gradient is that of the same draws. The error is relative to the exact product."
    )
    return Table("scoring", "Scoring cost", note, "what", rows, columns)


def networks(labels: Sequence[str]) -> list[str]:
    """Rows of what does not depend on training."""
    return [DENSE, *(row(method, label) for label in labels for method in ("gfprune", UNIFORM))]


def latency_table(labels: Sequence[str], batches: Sequence[int]) -> Table:
    columns = [Column("MACs", "macs share", percent)]
    for mode in ("eager", "compile"):
        for batch in batches:
            columns += [
                Column(f"{mode}, batch {batch}, ms", f"{mode} {batch} ms", number(2)),
                Column("speed-up", f"{mode} {batch} speed-up", lambda value: f"{value:.2f}x"),
            ]
    note = (
        "One evaluation of the network: medians of one interleaved run, the device synchronised around every "
        "call; on CUDA bf16 by autocast and channels_last."
    )
    return Table("latency", "Latency", note, "network", networks(labels), columns)


def memory_table(labels: Sequence[str], batches: Sequence[int]) -> Table:
    columns = [
        Column("weights, fp32, MB", "weights fp32", scaled(1e6, 1)),
        Column("weights, bf16, MB", "weights bf16", scaled(1e6, 1)),
        *(Column(f"a pass of {batch}, MB", f"pass {batch}", scaled(1e6, 1)) for batch in batches),
    ]
    note = "A pass is the peak of one evaluation as `gfprune eval` measures it, weights included."
    return Table("memory", "Memory", note, "network", networks(labels), columns)


def phases_table(labels: Sequence[str]) -> Table:
    rows = ["dense training", "scoring cost", "probe"]
    for label in labels:
        rows += [
            f"{part} {row(method, label)}" for method in METHODS for part in ("prune", "finetune", "eval")
        ]
    columns = [
        Column("seconds", "seconds", number(1)),
        Column("peak memory, MiB", "peak", scaled(1 << 20, 0)),
        Column("training steps", "steps", number(0)),
        Column("batch", "batch", number(0)),
    ]
    note = "Peaks are of all that torch held on the device. Sampling is most of `eval`."
    return Table(
        "phases", "Phases", note, "phase", [*rows, "latency, eager", "memory", "latency, compile"], columns
    )


@dataclass
class Board:
    """What has been measured, on disk after every change.

    Args:
        folder: gets the page and the same numbers as JSON.
        head: lines that open the page.
    """

    folder: Path
    tables: Sequence[Table]
    head: Sequence[str]
    cells: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / f"{NAME}.md"

    def put(self, table: str, row: str, **found: float | None) -> None:
        self.put_all(table, row, found)

    def put_all(self, table: str, row: str, found: Mapping[str, float | None]) -> None:
        known = next(entry for entry in self.tables if entry.key == table)
        assert row in known.rows, f"{table} has no row {row!r}"
        self.cells.setdefault(table, {}).setdefault(row, {}).update(found)
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    def text(self) -> str:
        """The page."""
        lines = ["# GPU", "", *self.head]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        for table in self.tables:
            lines += ["", *table.lines(self.cells.get(table.key, {}))]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Replace both files at once each, so that a kill leaves whole ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps({"notes": self.notes, "tables": self.cells}, indent=1) + "\n"
        for path, text in ((self.page, self.text()), (self.page.with_suffix(".json"), numbers)):
            staged = path.with_name(f".{path.name}.part")
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)


def is_measured(page: Path) -> bool:
    """Whether a page holds any number that a run has to repeat."""
    numbers = page.with_suffix(".json")
    return numbers.exists() and bool(json.loads(numbers.read_text())["tables"])
