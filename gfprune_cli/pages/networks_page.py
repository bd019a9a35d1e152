"""The networks of one prune run as a page: what each costs, what it still does, and how fast it is here.

Path("prune.html").write_text(render(networks, evaluations, grids), encoding="utf-8")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gfprune_cli.pages.drawing import BLUE, GREY, ORANGE, Tips, draw_svg, fill, human, percent, ratio, target
from gfprune_cli.pages.evaluation_page import SMALL, Grid, inline_png, png_width

Document = Mapping[str, Any]
SHOWN = 8  # images of each network
Value = Callable[["Network"], float | None]


@dataclass(frozen=True)
class Network:
    """One network as both commands describe it."""

    pruned: Document
    evaluated: Document

    @property
    def sparsity(self) -> float:
        return float(self.pruned["sparsity"]["achieved"])

    @property
    def loss(self) -> float | None:
        found = self.pruned["loss"]
        return found["recovered"] if found["recovered"] is not None else found["removed"]

    @property
    def ssim(self) -> float | None:
        metric = self.evaluated["metrics"].get("ssim")
        return None if metric is None else metric["value"]

    @property
    def timed(self) -> Document | None:
        """Of the largest batch, as PyTorch runs it."""
        rows = [row for row in self.evaluated["latency"] if row["mode"] == "eager"]
        return max(rows, key=lambda row: row["batch"]) if rows else None

    @property
    def time(self) -> float | None:
        """Of the dense network's; 1 is as slow."""
        row = self.timed
        return None if row is None or not row["speedup"] else 1 / row["speedup"]

    def left(self, key: str) -> float:
        return ratio(self.pruned[key]["after"], self.pruned[key]["before"])


def render(networks: Sequence[Document], evaluations: Sequence[Document], grids: Sequence[Grid]) -> str:
    """The page for the networks of a run, the least sparse first.

    Args:
        networks: what `gfprune prune --json` gives of each.
        evaluations: what `gfprune eval --json` gives of each, against the dense network.
        grids: (dense network's image, this network's image) of each, from the same noise, as PNG files.

    Returns:
        One HTML document with its style, plots and images inside; the same input gives the same text.
    """
    found = [Network(pruned, evaluated) for pruned, evaluated in zip(networks, evaluations, strict=True)]
    first = found[0].pruned
    images = [row[:SHOWN] for row in grids]
    pictures = [("dense", [inline_png(before) for before, _ in images[0]])] if images[0] else []
    pictures += [
        (target(network.pruned["sparsity"]["target"]), [inline_png(after) for _, after in row])
        for network, row in zip(found, images, strict=True)
        if row
    ]
    dense = first["loss"]["before"]
    plots = {
        "loss": plot("loss", "held-out loss", found, [("loss", lambda one: one.loss, BLUE)], dense),
        "size": plot(
            "size",
            "of the dense network",
            found,
            [
                ("parameters", lambda one: one.left("params"), BLUE),
                ("MACs", lambda one: one.left("macs"), ORANGE),
                ("time", lambda one: one.time, GREY),
            ],
            1.0,
        ),
    }
    if any(network.ssim is not None for network in found):
        plots["ssim"] = plot("ssim", "SSIM", found, [("SSIM", lambda one: one.ssim, BLUE)], 1.0)
    return fill(
        "networks.html",
        doc=first,
        columns=("sparsity", "parameters", "MACs", "file", "loss", "SSIM", "time", "of the dense", "folder"),
        rows=[dense_row(found[0]), *map(row_of, found)],
        plots=plots,
        pictures=pictures,
        small=all(png_width(image) <= SMALL for row in images for pair in row for image in pair if image),
        timed=found[0].timed,
        samples=found[0].evaluated["samples"],
    )


def dense_row(network: Network) -> list[str]:
    document, timed = network.pruned, network.timed
    sizes = [human(document["params"]["before"]), human(document["macs"]["before"])]
    time = "" if timed is None or timed["ms_reference"] is None else f"{timed['ms_reference']:.1f} ms"
    loss = f"{document['loss']['before']:.4f}"
    return ["dense", *sizes, human(document["bytes"]["before"], "B"), loss, "1", time, "100 %", ""]


def row_of(network: Network) -> list[str]:
    document, timed = network.pruned, network.timed
    sizes = [human(document["params"]["after"]), human(document["macs"]["after"])]
    return [
        target(document["sparsity"]["target"]),
        *sizes,
        human(document["bytes"]["after"], "B"),
        "" if network.loss is None else f"{network.loss:.4f}",
        "" if network.ssim is None else f"{network.ssim:.3f}",
        "" if timed is None else f"{timed['ms']:.1f} ms",
        "" if network.time is None else percent(network.time),
        document["output"] or "",
    ]


def plot(
    name: str, axis: str, networks: Sequence[Network], curves: Sequence[tuple[str, Value, str]], dense: float
) -> Markup:
    """Curves over the sparsity that was reached, from the dense network on."""

    def paint(axes: Any) -> Tips:
        for text, value, colour in curves:
            points = [(one.sparsity, value(one)) for one in networks]
            known = [(0.0, dense), *((100 * at, number) for at, number in points if number is not None)]
            axes.plot(*zip(*known, strict=True), "o-", color=colour, label=text)
        axes.set_xlim(0, 100 * networks[-1].sparsity * 1.05)
        axes.set_ylim(0 if name != "ssim" else None, None)
        axes.grid()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_xlabel("sparsity")
        axes.set_ylabel(axis)
        if len(curves) > 1:
            axes.legend(loc="lower left")
        return []

    return draw_svg(name, f"{axis} over the sparsity", (318, 260), (56, 48, 14, 8), paint)
