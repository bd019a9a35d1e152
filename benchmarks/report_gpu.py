"""Tables of `gpu.py`: what is known so far, written after every number; a killed run keeps what it has."""

import json
import os
import re
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
PARTS = ("quality", "speed", "large")  # each a run, or a share of one


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
    """A table whose rows are known before anything is measured.

    Args:
        part: of `PARTS`.
    """

    part: str
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
    return Table("quality", "quality", "Quality", note, "network", rows, columns)


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
    return Table("quality", "scoring", "Scoring cost", note, "what", rows, columns)


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
    return Table("quality", "latency", "Latency", note, "network", networks(labels), columns)


def memory_table(labels: Sequence[str], batches: Sequence[int]) -> Table:
    columns = [
        Column("weights, fp32, MB", "weights fp32", ".1f", 1e6),
        Column("weights, bf16, MB", "weights bf16", ".1f", 1e6),
        *(Column(f"a pass of {batch}, MB", f"pass {batch}", ".1f", 1e6) for batch in batches),
    ]
    note = "A pass is the peak of one evaluation as `gfprune eval` measures it, weights included."
    return Table("quality", "memory", "Memory", note, "network", networks(labels), columns)


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
    return Table("quality", "phases", "Phases", note, "phase", [*rows, "latency", "memory"], columns)


def budget_row(runtime: str, batch: int, asked: float) -> str:
    return f"{runtime}, batch {batch}, asked {asked:g}"


def speed_table(rows: Sequence[str], words: str) -> Table:
    columns = [
        Column("first try", "first", ".2f"),
        Column("measured", "measured", ".2f"),
        Column("written", "written", ".2f"),
        Column("off", "off", "+.1%"),
        Column("MAC gain", "macs", ".2f"),
        Column("seconds", "seconds", ".0f"),
    ]
    note = (
        f"`gfprune prune --speedup` of {words}, random weights, in bf16 on CUDA, one-shot without refit and "
        "recovery. *First try* is what the table of times alone led to, *measured* what the run took in the "
        "end, *written* the checkpoint on disk, timed afterwards in turns with the dense one. Rows of dashes "
        "are out of reach: the notes above say why."
    )
    return Table("speed", "speed", "Speed-up asked and measured", note, "what", rows, columns)


def large_table(words: str) -> Table:
    columns = [
        Column("planned, GB", "planned", ".2f", 1e9),
        Column("peak memory, GB", "peak", ".2f", 1e9),
        Column("seconds", "seconds", ".0f"),
    ]
    note = (
        f"{words}, random weights: `gfprune prune` with its defaults but few draws and images, and `gfprune "
        "finetune --lora` of what it wrote, for 20 steps; each in a process of its own."
    )
    return Table("large", "large", "Large network", note, "what", ["prune", "finetune"], columns)


@dataclass
class Board:
    """What has been measured, on disk after every change.

    Args:
        folder: gets the page and the same numbers as JSON; parts that are not run stay as they are there.
        head: lines that say where the numbers are from.
        parts: those that are run.
        about: part -> where its numbers are from, and notes.
    """

    folder: Path
    tables: Sequence[Table]
    head: Sequence[str]
    parts: Sequence[str] = PARTS
    cells: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    about: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = self.page.with_suffix(".json")
        if kept.exists():
            known = json.loads(kept.read_text(encoding="utf-8"))
            stay = {table.key for table in self.tables if table.part not in self.parts}
            self.cells = {key: found for key, found in known["tables"].items() if key in stay}
            self.about = {part: lines for part, lines in known["about"].items() if part not in self.parts}
        self.about |= {part: [*self.head, ""] for part in self.parts}

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

    def note(self, part: str, text: str) -> None:
        self.about[part].append(f"- {text}")
        print(text, flush=True)
        self.write()

    def text(self) -> str:
        """The page."""
        lines = ["# GPU"]
        for part in (part for part in PARTS if part in self.about):
            tables = [table for table in self.tables if table.part == part]
            titles = ", ".join(table.title for table in tables)
            lines += ["", f"{titles}:", "", *self.about[part]]
        for one in self.tables:
            lines += ["", *one.lines(self.cells.get(one.key, {}))]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"

    def write(self) -> None:
        """Replace both files at once each, so that a kill leaves whole ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps({"about": self.about, "tables": self.cells}, indent=1) + "\n"
        for path, text in ((self.page, self.text()), (self.page.with_suffix(".json"), numbers)):
            staged = path.with_name(f".{path.name}.part")
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
