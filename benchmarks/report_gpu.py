"""Tables of `gpu.py`: what is known so far, written after every number; a killed run keeps what it has."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from provenance import table

NAME = "gpu"
NOT_MEASURED = "not measured"
NO_FIGURE = "–"  # the row has no such number
DENSE = "dense"
METHODS = {"gfprune": "gfprune", "taylor": "Torch-Pruning, Taylor", "diff-pruning": "Diff-Pruning"}
PEERS = tuple(name for name in METHODS if name != "gfprune")
UNIFORM = "Torch-Pruning widths"  # what both peers leave, whatever their scores


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, the name of its number, and how that is written: in which unit."""

    head: str
    key: str
    form: str
    unit: float = 1.0
    after: str = ""

    def cell(self, found: Mapping[str, float | None]) -> str:
        if self.key not in found:
            return NOT_MEASURED
        value = found[self.key]
        return NO_FIGURE if value is None else f"{value / self.unit:{self.form}}{self.after}"


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
        rows = [[row, *(column.cell(cells.get(row, {})) for column in self.columns)] for row in self.rows]
        return [f"## {self.title}", "", self.note, "", *table(heads, rows)]


def row(method: str, label: str) -> str:
    """The name of a row: a method, and the share of the parameters that is gone."""
    return f"{METHODS.get(method, method)}, {label}"


def quality_table(labels: Sequence[str]) -> Table:
    rows = [DENSE, *(row(method, label) for label in labels for method in METHODS)]
    columns = [
        Column("parameters", "params share", ".1%"),
        Column("MACs", "macs share", ".1%"),
        Column("gradients", "gradients", ".0f"),
        Column("held-out loss", "loss", ".4f"),
        Column("SSIM to dense", "ssim", ".3f"),
        Column("fd_teacher", "fd_teacher", ".2f"),
        Column("pruning, s", "prune seconds", ".1f"),
        Column("finetuning, s", "finetune seconds", ".1f"),
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
        Column("seconds", "seconds", ".3f"),
        Column("of one gradient", "gradients", ".2f", after="x"),
        Column("memory above the weights, MiB", "rise", ".0f", 1 << 20),
        Column("of one gradient's", "rises", ".2f", after="x"),
        Column("error of the product", "error", ".0e"),
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
    columns = [Column("MACs", "macs share", ".1%")]
    for batch in batches:
        columns += [
            Column(f"batch {batch}, ms", f"{batch} ms", ".2f"),
            Column("speed-up", f"{batch} speed-up", ".2f", after="x"),
        ]
    note = (
        "One evaluation of the network in eager PyTorch: medians of one interleaved run, the device "
        "synchronised around every call; on CUDA bf16 by autocast and channels_last."
    )
    return Table("latency", "Latency", note, "network", networks(labels), columns)


def memory_table(labels: Sequence[str], batches: Sequence[int]) -> Table:
    columns = [
        Column("weights, fp32, MB", "weights fp32", ".1f", 1e6),
        Column("weights, bf16, MB", "weights bf16", ".1f", 1e6),
        *(Column(f"a pass of {batch}, MB", f"pass {batch}", ".1f", 1e6) for batch in batches),
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
        Column("seconds", "seconds", ".1f"),
        Column("peak memory, MiB", "peak", ".0f", 1 << 20),
        Column("training steps", "steps", ".0f"),
        Column("batch", "batch", ".0f"),
    ]
    note = "Peaks are of all that torch held on the device. Sampling is most of `eval`."
    return Table("phases", "Phases", note, "phase", [*rows, "latency", "memory"], columns)


def all_tables(labels: Sequence[str], scorings: Sequence[str], batches: Sequence[int]) -> list[Table]:
    """Those of the page, in their order."""
    return [
        quality_table(labels),
        scoring_table(scorings),
        latency_table(labels, batches),
        memory_table(labels, batches),
        phases_table(labels),
    ]


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

    def put(self, name: str, row: str, **found: float | None) -> None:
        self.put_all(name, row, found)

    def put_all(self, name: str, row: str, found: Mapping[str, float | None]) -> None:
        known = next(entry for entry in self.tables if entry.key == name)
        assert row in known.rows, f"{name} has no row {row!r}"
        self.cells.setdefault(name, {}).setdefault(row, {}).update(found)
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
        for one in self.tables:
            lines += ["", *one.lines(self.cells.get(one.key, {}))]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Replace both files at once each, so that a kill leaves whole ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps({"notes": self.notes, "tables": self.cells}, indent=1) + "\n"
        for path, text in ((self.page, self.text()), (self.page.with_suffix(".json"), numbers)):
            staged = path.with_name(f".{path.name}.part")
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
