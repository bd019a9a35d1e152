"""The tables of an evaluation, as text cells: the HTML page and the Markdown report show the same ones."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gfprune_cli.evaluation.metrics import METRICS
from gfprune_cli.pages.drawing import human, percent

Document = Mapping[str, Any]
Row = tuple[str, ...]
NONE = "–"
SIZES = (
    ("params", "parameters", ""),
    ("macs", "MACs per image", ""),
    ("bytes", "weight files", "B"),
    ("memory", "peak memory", "B"),
)
MODES = {"eager": "eager", "compile": "torch.compile", "deepcache": "DeepCache"}
SETTINGS = {"count": "samples"}
GATES = {"min": "at least", "max": "at most"}
DEEPCACHE = (
    "DeepCache: the model with its deep features computed on every fifth step only (arXiv 2312.00858), "
    "averaged over the five steps{beside}. Caching changes the images; samples and metrics are without it."
)


@dataclass(frozen=True)
class Table:
    """One table: the columns `words` hold words, all others numbers."""

    title: str
    intro: str
    columns: Row
    rows: Sequence[Row]
    words: tuple[int, ...] = (0,)
    note: str = ""


def number(value: Any, digits: int = 4) -> str:
    """0.0123456 -> "0.01235"; what is no finite number is said so."""
    if value is None:
        return NONE
    if isinstance(value, bool | str):
        return str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def pair(document: Document, key: str) -> tuple[Any, Any]:
    """(model, reference) of one of `SIZES`, None for what was not measured."""
    found = document.get(key) or {}
    return found.get("model"), found.get("reference")


def mode_name(row: Mapping[str, Any]) -> str:
    return MODES.get(row["mode"], str(row["mode"]))


def metric_name(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


def gate_name(gate: Mapping[str, Any]) -> tuple[str, str]:
    """ "max-fid" -> ("FID", "at most")."""
    side, _, name = str(gate["name"]).partition("-")
    label = {"speedup": "speed-up"}.get(name) or metric_name(name.replace("-", "_"))
    return (label, GATES[side]) if side in GATES and name else (str(gate["name"]), "")


def tables(document: Document) -> dict[str, Table]:
    """The tables that a document has anything for, by name, in the order in which they are read."""
    made = {
        "gates": gates_table(document),
        "metrics": metrics_table(document),
        "cost": cost_table(document),
        "fold": fold_table(document),
        "latency": latency_table(document),
        "loss": loss_table(document),
        "provenance": provenance_table(document),
    }
    return {name: table for name, table in made.items() if table.rows}


def gates_table(document: Document) -> Table:
    rows = []
    for gate in document.get("gates") or []:
        label, side = gate_name(gate)
        limit = f"{side} {number(gate['limit'])}".strip()
        rows.append((label, "passed" if gate["passed"] else "missed", number(gate["value"]), limit))
    return Table(
        "Gates",
        "The limits that this evaluation was asked to hold.",
        ("gate", "", "measured", "limit"),
        rows,
        words=(0, 1),
    )


def metrics_table(document: Document) -> Table:
    rows = []
    for name, metric in (document.get("metrics") or {}).items():
        interval = metric.get("ci95")
        between = f"{number(interval[0])} to {number(interval[1])}" if interval else NONE
        more = ", ".join(
            f"{key.replace('_', ' ')} {number(value)}"
            for key, value in metric.items()
            if key not in ("value", "ci95", "n") and isinstance(value, int | float | str)
        )
        label, meaning = metric_name(name), METRICS[name].meaning if name in METRICS else ""
        meaning = "; ".join(filter(None, (meaning, more)))
        rows.append((label, number(metric.get("value")), between, number(metric.get("n")), meaning))
    columns = ("metric", "value", "95 % confidence", "n", "what it says")
    return Table("Metrics", "", columns, rows, words=(0, 4))


def cost_table(document: Document) -> Table:
    sizes = [(label, unit, *pair(document, key)) for key, label, unit in SIZES]
    sizes = [size for size in sizes if size[2] is not None]
    compared = any(reference is not None for *_, reference in sizes)
    rows: list[Row] = []
    for label, unit, model, reference in sizes:
        row: Row = (label, human(model, unit), number(model))
        if compared:
            before = NONE if reference is None else human(reference, unit)
            left = percent(model / reference) if reference else NONE
            row = (label, before, human(model, unit), left, number(reference), number(model))
        rows.append(row)
    columns: Row = ("", "model", "exactly")
    if compared:
        columns = ("", "reference", "model", "left", "reference, exactly", "model, exactly")
    what = (document.get("memory") or {}).get("what")
    measured = what and pair(document, "memory")[0] is not None
    return Table("Size and work", "", columns, rows, note=f"Peak memory: {what}." if measured else "")


def latency_table(document: Document) -> Table:
    latencies = document.get("latency") or []
    compared = any(row.get("ms_reference") is not None for row in latencies)
    rows: list[Row] = []
    for row in latencies:
        before, after = number(row.get("ms_reference")), number(row["ms"])
        ratios = times(row.get("speedup")), times(row.get("mac_ratio"))
        spreads = quartiles(row.get("spread_reference")), quartiles(row.get("spread"))
        cells = (before, after, *ratios, *spreads) if compared else (after, spreads[1])
        rows.append((mode_name(row), number(row["batch"]), *cells))
    columns: Row = ("", "batch", "model", "quartiles")
    if compared:
        columns = ("", "batch", "reference", "model", "speed-up", "MAC ratio")
        columns += ("reference, quartiles", "model, quartiles")
    intro = "One evaluation of the network, median of repeats, in milliseconds."
    if compared:
        intro += (
            " Both networks were timed in turn in the same run. The MAC ratio is the speed-up that the work "
            "alone would promise."
        )
    note = DEEPCACHE.format(beside=", beside the reference without a cache" if compared else "")
    cached = any(row["mode"] == "deepcache" for row in latencies)
    return Table("Latency", intro, columns, rows, note=note if cached else "")


def quartiles(spread: Sequence[float] | None) -> str:
    return f"{number(spread[0])} to {number(spread[1])}" if spread else NONE


def fold_table(document: Document) -> Table:
    fold = document.get("fold")
    rows = []
    if fold:
        before, after = fold["params"]["before"], fold["params"]["after"]
        rows = [
            ("layers folded", number(fold["layers"])),
            ("parameters", f"{human(before)} to {human(after)}"),
            ("tolerance of each layer", percent(fold["tolerance"], 2)),
            ("error of the worst layer", percent(fold["layer_error"], 2)),
            ("error of the network's output", percent(fold["output_error"], 2)),
        ]
    intro = (
        "Linear layers that see timestep and pooled conditions alone are two thin ones. By the record of the "
        "checkpoint, relative to the dense network, at timesteps and conditions that were held out, before "
        "any channel was removed."
    )
    return Table("Modulation folding", intro, ("", "value"), rows)


def loss_table(document: Document) -> Table:
    bins = document.get("loss_by_timestep") or []
    compared = any(row.get("loss_reference") is not None for row in bins)
    rows = []
    for row in bins:
        losses: Row = (number(row["loss"]),)
        if compared:
            before = row.get("loss_reference")
            change = f"{row['loss'] / before - 1:+.1%}".replace("%", " %") if before else NONE
            losses = (number(before), *losses, change)
        rows.append((f"{row['from']} to {row['to']}", *losses, number(row.get("n"))))
    columns: Row = (
        ("timesteps", "reference", "model", "change", "n") if compared else ("timesteps", "loss", "n")
    )
    intro = "How well the network predicts at each noise level; low timesteps have little noise."
    return Table("Loss by timestep", intro, columns, rows)


def provenance_table(document: Document) -> Table:
    samples = document.get("samples") or {}
    named = [
        ("model", document.get("model")),
        ("reference", document.get("reference")),
        ("component", document.get("component")),
        ("class", document.get("class_name")),
        *((SETTINGS.get(key, key.replace("_", " ")), value) for key, value in samples.items()),
        ("device", document.get("device")),
        *(document.get("tools") or {}).items(),
    ]
    seconds = document.get("seconds")
    if seconds is not None:
        named.append(("time taken", f"{seconds:.0f} s"))
    # a seed is a name more than a number: no thousands
    rows = [(key, str(value)) for key, value in named if value is not None and value != ""]
    return Table("How it was measured", "", ("setting", "value"), rows, words=(0, 1))


def literal(text: str) -> str:
    """Text that Markdown, GitHub's with tables and HTML included, shows as it is on one line."""
    text = " ".join(text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8").split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#!|~$@])", r"\\\1", text)
