"""`eval` as a page and as Markdown: how good a network is, how close to its reference, how much cheaper.

Path("eval.html").write_text(render(result.document(), result.grid), encoding="utf-8")
"""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gfprune_cli.pages.drawing import BLUE, GREY, Tips, add_tips, draw_svg, fill, human, percent, ratio
from gfprune_cli.pages.evaluation_tables import (
    SIZES,
    Document,
    Table,
    literal,
    metric_name,
    mode_name,
    number,
    pair,
    tables,
    times,
)  # fmt: skip

Grid = Sequence[tuple[bytes, bytes]]

SMALL = 128  # px: images up to this width are enlarged with their pixels kept square
LOG_FROM = 8  # times between the smallest and the largest loss, from which the axis is logarithmic
HEADLINES = ("fid", "fd_teacher", "ssim", "loss")


@dataclass(frozen=True)
class Tile:
    """One figure of the header."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Bar:
    """A cost as a share of the reference's, and the two numbers in words."""

    name: str
    share: float
    words: str


def render(document: Document, grid: Grid = ()) -> str:
    """The page for an `eval` document.

    Args:
        document: what `gfprune eval --json` gives. Parts that are null, empty or not there are left out.
        grid: (reference's image, model's image) from the same noise, as PNG files; an empty file for none.

    Returns:
        One HTML document with its style, plots and images inside; the same input gives the same text.
    """
    plots = {}
    if bins := loss_bins(document):
        plots["loss"] = loss_plot(bins)
    found = tables(document)
    return fill(
        "evaluation.html",
        doc={key: document.get(key) for key in ("model", "reference", "class_name", "component")},
        tiles=tiles(document),
        tables=found,
        missed=[gate for gate in document.get("gates") or [] if not gate["passed"]],
        warnings=list(document.get("warnings") or []),
        pictures=[(inline_png(before), inline_png(after)) for before, after in grid],
        small=all(png_width(image) <= SMALL for images in grid for image in images if image),
        bars=relative_costs(document),
        plots=plots,
    )


def markdown(document: Document) -> str:
    """The same figures as GitHub Markdown."""
    model, reference = literal(str(document.get("model"))), document.get("reference")
    lines = [f"# {model}", ""]
    if reference is not None:
        lines += [f"Compared with {literal(str(reference))}.", ""]
    lines += [
        f"- **{literal(tile.label)}**: {literal(tile.value)}{remark(tile.detail)}" for tile in tiles(document)
    ]
    for warning in document.get("warnings") or []:
        lines += ["", "> [!WARNING]", f"> {literal(str(warning))}"]
    for table in tables(document).values():
        lines += ["", f"## {table.title}", "", *([table.intro, ""] if table.intro else [])]
        lines += markdown_table(table)
        lines += ["", literal(table.note)] if table.note else []
    return "\n".join(lines).strip() + "\n"


def remark(text: str) -> str:
    return f" ({literal(text)})" if text else ""


def markdown_table(table: Table) -> list[str]:
    sides = [":--" if column in table.words else "--:" for column in range(len(table.columns))]
    cells = [table.columns, *table.rows]
    lines = [f"| {' | '.join(map(literal, row))} |" for row in cells]
    return [lines[0], f"|{'|'.join(sides)}|", *lines[1:]]


def tiles(document: Document) -> list[Tile]:
    """What a reader asks first: the gates, how much smaller, how much faster, how close."""
    made = []
    if gates := document.get("gates"):
        missed = sum(not gate["passed"] for gate in gates)
        verdict = f"{missed} of {len(gates)} missed" if missed else "passed"
        made.append(Tile("Gates", verdict, "" if missed else f"{len(gates)} of {len(gates)}"))
    for key, label, unit in SIZES[:3]:
        model, reference = pair(document, key)
        if model is not None:
            change = f"{percent(ratio(model, reference))} of {human(reference, unit)}" if reference else ""
            made.append(Tile(capital(label), human(model, unit), change))
    if (latency := headline_latency(document)) is not None:
        promise = latency.get("mac_ratio")
        detail = f"{mode_name(latency)}, batch {latency['batch']}"
        detail += f"; MACs promise {times(promise)}" if promise else ""
        made.append(Tile("Speed-up", times(latency["speedup"]), detail))
    metrics = document.get("metrics") or {}
    for name in HEADLINES:
        if (metric := metrics.get(name)) and metric.get("value") is not None:
            made.append(
                Tile(capital(metric_name(name)), number(metric["value"]), metric_detail(name, metrics))
            )
    return made


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def metric_detail(name: str, metrics: Mapping[str, Any]) -> str:
    metric = metrics[name]
    if name == "loss" and (reference := metrics.get("loss_reference")):
        return f"reference {number(reference.get('value'))}"
    if interval := metric.get("ci95"):
        return f"{number(interval[0])} to {number(interval[1])}"
    return f"{number(metric.get('n'))} samples" if metric.get("n") is not None else ""


def headline_latency(document: Document) -> Mapping[str, Any] | None:
    """The row that says most about throughput: the largest batch, without a compiler or a cache."""
    rows = [row for row in document.get("latency") or [] if row.get("speedup") is not None]
    rows = [row for row in rows if row["mode"] == "eager"] or [
        row for row in rows if row["mode"] == "compile"
    ]
    return max(rows, key=lambda row: row["batch"], default=None)


def relative_costs(document: Document) -> list[Bar]:
    """All that was measured on both networks."""
    found = []
    for key, label, unit in SIZES:
        model, reference = pair(document, key)
        if model is not None and reference:
            found.append(Bar(label, model / reference, f"{human(model, unit)} of {human(reference, unit)}"))
    for row in document.get("latency") or []:
        if row.get("ms_reference"):
            name = f"latency, {mode_name(row)}, batch {row['batch']}"
            words = f"{number(row['ms'], 3)} of {number(row['ms_reference'], 3)} ms"
            found.append(Bar(name, row["ms"] / row["ms_reference"], words))
    return [bar for bar in found if math.isfinite(bar.share)]


def loss_bins(document: Document) -> list[Mapping[str, Any]]:
    """The bins that can be drawn."""
    bins = document.get("loss_by_timestep") or []
    return [row for row in bins if row["loss"] is not None and math.isfinite(row["loss"])]


def loss_plot(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Denoising loss of the model, and of the reference, over the timestep."""
    middles = [(row["from"] + row["to"]) / 2 for row in bins]
    before = [(middle, row["loss_reference"]) for middle, row in zip(middles, bins, strict=True)
              if row.get("loss_reference") is not None and math.isfinite(row["loss_reference"])]  # fmt: skip
    values = [row["loss"] for row in bins] + [loss for _, loss in before]

    def paint(axes: Any) -> Tips:
        if before:
            axes.plot(*zip(*before, strict=True), "s--", color=GREY, label="reference")
        axes.plot(middles, [row["loss"] for row in bins], "o-", color=BLUE, label="model")
        if min(values) > 0 and max(values) > LOG_FROM * min(values):
            axes.set_yscale("log")
            axes.tick_params(which="minor", length=0)
        else:
            axes.set_ylim(min(0.0, *values), 1.08 * max(*values, 0.0) or 1)
        axes.set_xlim(bins[0]["from"], bins[-1]["to"])
        axes.grid()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("timestep (noise grows to the right)")
        if before:
            axes.legend(loc="best")
        add_tips(axes, ((row["from"], row["to"]) for row in bins))
        return list(map(loss_tip, bins))

    first, last = bins[0], bins[-1]
    label = (
        f"Curves of the denoising loss: the model's goes from {number(first['loss'])} "
        f"at timestep {first['from']} to {number(last['loss'])} at {last['to']}."
    )
    return draw_svg("loss", label, (520, 320), (64, 48, 22, 8), paint)


def loss_tip(row: Mapping[str, Any]) -> str:
    """What the pointer is told over one bin."""
    known = row.get("loss_reference")
    reference = "" if known is None else f"\nreference {number(known)}"
    return f"timesteps {row['from']} to {row['to']}\nmodel {number(row['loss'])}{reference}"


def inline_png(image: bytes) -> str:
    """A file as a URL that holds it, "" for none."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii") if image else ""


def png_width(image: bytes) -> int:
    """Pixels across: the first number of the header chunk."""
    return int(struct.unpack(">I", image[16:20])[0])
