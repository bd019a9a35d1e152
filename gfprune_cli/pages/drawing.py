"""Pages that show a command's JSON document to people, and the inline SVG that their plots are."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

Tips = Sequence[str]  # what the pointer is told over the shapes with the ids tip-0, tip-1, ...

# Legible on white and on near-black.
BLUE, ORANGE, PURPLE, GREY = "#3f7fc1", "#d9812e", "#9a6ee0", "#8a8f98"
INK = "#010203"  # stands for the page's text colour until the SVG is inlined
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a module's name is no mathematics
    "font.size": 11,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("xtick.major.pad", "ytick.major.pad"), 7),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "right", "bottom", "left")), False),
    "legend.frameon": False,
}


def fill(template: str, tests: Mapping[str, Callable[[Any], bool]] | None = None, **values: Any) -> str:
    """A page from one of the templates beside this file; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": "{:,}".format, "percent": percent, "target": target, "human": human}
    environment.tests |= tests or {}
    page = environment.get_template(template).render(values)
    # A JSON string may hold half a surrogate pair, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def target(share: float) -> str:
    """0.445 -> "44.5 %", 0.5 -> "50 %"."""
    return f"{100 * share:g} %"


def human(value: float, unit: str = "") -> str:
    """1740323 -> "1.74 M"."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    number = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{number} {prefixes[0]}{unit}".strip()


def draw_svg(
    salt: str,
    label: str,
    size: tuple[int, int],
    margins: tuple[int, int, int, int],
    paint: Callable[[Any], Tips],
) -> Markup:
    """Inline SVG of what `paint` puts on the axes; `margins` in px are left, bottom, right, top."""
    import matplotlib
    from matplotlib.figure import Figure

    (width, height), (left, bottom, right, top) = size, margins
    text = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc has no say in the page
        settings: Any = STYLE | {"svg.hashsalt": salt}
        # Ids are hashed with the salt: one salt per plot keeps them apart on the page.
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width / 72, height / 72))  # SVG counts 72 units per inch
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        tips = paint(figure.add_axes(box))
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return inline(text.getvalue(), label, size, tips)


def add_tips(axes: Any, columns: Iterable[tuple[float, float]]) -> None:
    """Columns of the axes, from and to, that the pointer is told something over."""
    from matplotlib.patches import Rectangle

    bottom = axes.get_xaxis_transform()
    for place, (left, right) in enumerate(columns):
        column = Rectangle((left, 0), right - left, 1, transform=bottom, fill=False, linewidth=0)
        column.set_gid(f"tip-{place}")
        axes.add_patch(column)


def inline(svg: str, label: str, size: tuple[int, int], tips: Tips) -> Markup:
    """Matplotlib's file as an element of the page: its own ids, no namespaces, colours of the page."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<(metadata|style).*?</\1>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(rf"(fill|stroke): {INK}", r"\1: currentColor", body)
    body = re.sub(
        r'<g id="tip-(\d+)">',
        lambda found: f'<g class="tip"><title>{escape(tips[int(found[1])])}</title>',
        body,
    )
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    width, height = size
    opening = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    return Markup(f'{opening} aria-label="{escape(label)}">{body}')  # noqa: S704 - Matplotlib wrote it, from our data
