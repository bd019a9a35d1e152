"""`analyze` as a page: where a network's weights and work are, and what each sparsity would leave.

Path("analysis.html").write_text(render(analyze("demo", sparsity=[0.5]).document()), encoding="utf-8")
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from gfprune_cli.pages.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Tips,
    add_tips,
    draw_svg,
    fill,
    human,
    percent,
    ratio,
    target,
)

Group = Mapping[str, Any]
Plan = Mapping[str, Any]

WIDE = 960  # px, the plots along the network
SIDE = 54  # px, left of the axes, for the percentages
LABELLED = 40  # sensitivity bars that get a label each; of more groups both ends are shown
LEFT = (
    ("params", "parameters", BLUE, "o-"),
    ("macs", "MACs", ORANGE, "o-"),
    ("bytes", "file size", GREY, "s--"),
)
SHORT = {
    "down_blocks": "down",
    "mid_block": "mid",
    "up_blocks": "up",
    "resnets": "res",
    "attentions": "attn",
    "transformer_blocks": "block",
    "single_transformer_blocks": "single",
    "downsamplers": "downsample",
    "upsamplers": "upsample",
    "conv_shortcut": "shortcut",
    "time_embedding": "time",
}
ORDER = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3, "conv_norm_out": 4, "conv_out": 4}


def render(document: Mapping[str, Any]) -> str:
    """The page for an `analyze` document.

    Args:
        document: what `Analysis.document()` or `gfprune analyze --json` gives; `plan` may be empty and
            `sensitivity` null.

    Returns:
        One HTML document with its style and plots inside; the same input gives the same text.
    """
    groups = network_order(document["groups"])
    plans = sorted(document.get("plan") or [], key=lambda plan: plan["sparsity"])
    measured = sorted(filter(is_measured, groups), key=lambda group: -group["sensitivity"])
    plots = {}
    if groups:
        plots["where"] = where_plot(document, groups)
    faster = sorted(document.get("speedups") or [], key=lambda plan: plan["speedup"])
    time = document.get("time")
    if time:
        plots["time"] = time_plot(document, network_order(time["layers"]))
    if groups and (plans or faster):
        plots["widths"] = widths_plot(groups, [*plans, *faster])
    if plans:
        plots["left"] = left_plot(document, plans)
    if measured:
        plots["sensitivity"] = sensitivity_plot(measured)
    return fill(
        "analysis.html",
        tests={"measured": is_measured},
        doc=document,
        groups=groups,
        plans=plans,
        faster=faster,
        time=time,
        titled=titled,
        measured=measured,
        plots=plots,
    )


def titled(plan: Plan) -> str:
    """What a plan is for: a sparsity, or a speed-up."""
    return f"{plan['speedup']:g} times" if "speedup" in plan else target(plan["sparsity"])


def is_measured(group: Group) -> bool:
    value = group.get("sensitivity")
    return value is not None and math.isfinite(value)


def network_order(groups: Sequence[Group]) -> list[Group]:
    """The groups in the order in which data meets them: modules of a U-Net list `up` before `mid`."""
    return sorted(groups, key=lambda group: ORDER.get(group["name"].split(".")[0], 0))


def plain(name: str) -> str:
    """`name` in characters that every font has."""
    return "".join(char if " " <= char <= "~" else "?" for char in name)


def shorten(name: str, limit: int = 46) -> str:
    """down_blocks.2.resnets.0.conv1 -> "down 2 · res 0 · conv1", cut in the middle beyond `limit`."""
    words: list[str] = []
    for part in plain(name).split("."):
        if part.isdigit() and words:
            words[-1] += f" {part}"
        else:
            words.append(SHORT.get(part, part))
    text = " · ".join(words)
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def section(name: str) -> str:
    """The block a group belongs to: "down_blocks.2.resnets.0.conv1" -> "down 2"."""
    parts = name.split(".")
    return shorten(".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1]), limit=13)


def where_plot(document: Mapping[str, Any], groups: Sequence[Group]) -> Markup:
    """Share of the parameters (up) and MACs (down) that each group accounts for, along the network."""
    params = [ratio(group["params"], document["params"]) for group in groups]
    macs = [ratio(group["macs"], document["macs"]) for group in groups]
    tips = [
        f"{group['name']}\n{group['channels']:,} channels\n"
        f"{group['params']:,} parameters ({percent(weights)})\n{group['macs']:,} MACs ({percent(work)})"
        for group, weights, work in zip(groups, params, macs, strict=True)
    ]
    largest = max(groups, key=lambda group: group["params"])
    label = (
        f"Bar chart of {len(groups)} channel groups in network order. The most parameters, "
        f"{human(largest['params'])}, are in {largest['name']}."
    )
    width = 0.8 if len(groups) <= 80 else 0.94
    return mirrored_plot("where", label, groups, (params, "parameters", BLUE), macs, width, tips)


def time_plot(document: Mapping[str, Any], layers: Sequence[Group]) -> Markup:
    """Share of the time (up) and of the MACs (down) of each layer, along the network."""
    times = [ratio(layer["ms"], document["time"]["ms"]) for layer in layers]
    macs = [ratio(layer["macs"], document["macs"]) for layer in layers]
    tips = [
        f"{layer['name']}\n{layer['ms']:.3g} ms ({percent(share)})\n{layer['params']:,} parameters\n"
        f"{layer['macs']:,} MACs ({percent(work)})"
        for layer, share, work in zip(layers, times, macs, strict=True)
    ]
    slowest = max(layers, key=lambda layer: layer["ms"])
    label = (
        f"Bar chart of {len(layers)} layers in network order. The most time is spent in {slowest['name']}."
    )
    return mirrored_plot("time", label, layers, (times, "time", PURPLE), macs, 0.9, tips)


def mirrored_plot(
    name: str,
    label: str,
    groups: Sequence[Group],
    upper: tuple[Sequence[float], str, str],
    macs: Sequence[float],
    width: float,
    tips: Tips,
) -> Markup:
    """Shares (`upper`, with their name and colour) above the axis, those of the MACs below it."""
    shares, words, colour = upper

    def paint(axes: Any) -> Tips:
        axes.bar(range(len(groups)), [100 * share for share in shares], width, color=colour)
        axes.bar(range(len(groups)), [-100 * share for share in macs], width, color=ORANGE)
        axes.set_ylim(-120 * (max(macs) or 0.01), 120 * (max(shares) or 0.01))
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        axes.grid(axis="y")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
        axes.text(0.006, 0.98, words, color=colour, transform=axes.transAxes, va="top", weight="bold")
        axes.text(0.006, 0.02, "MACs", color=ORANGE, transform=axes.transAxes, va="bottom", weight="bold")
        along_network(axes, groups)
        return tips

    bottom = below(groups)
    return draw_svg(name, label, (WIDE, 290 + bottom), (SIDE, bottom, 4, 4), paint)


def widths_plot(groups: Sequence[Group], plans: Sequence[Plan]) -> Markup:
    """Heat map of the share of channels that each group (column) loses at each sparsity (row)."""

    def kept(group: Group, plan: Plan) -> int:
        return int(plan["kept"].get(group["name"], group["channels"]))

    def paint(axes: Any) -> Tips:
        from matplotlib.colors import LinearSegmentedColormap

        # By opacity, so that the page's own background means "all kept" in light and dark alike.
        colours = LinearSegmentedColormap.from_list("removed", [PURPLE + "14", PURPLE + "ff"])
        edges = [place - 0.5 for place in range(len(groups) + 1)]
        for row, plan in enumerate(plans):
            gone = [1 - ratio(kept(group, plan), group["channels"]) for group in groups]
            axes.pcolormesh(edges, [row + 0.04, row + 0.96], [gone], cmap=colours, vmin=0, vmax=1)
        axes.set_ylim(len(plans), 0)
        places = [row + 0.5 for row in range(len(plans))]
        axes.set_yticks(places, [titled(plan) for plan in plans])
        along_network(axes, groups, shaded=False)
        return [
            "\n".join(
                [group["name"], f"{group['channels']:,} channels"]
                + [f"{titled(plan)}: {kept(group, plan):,} kept" for plan in plans]
            )
            for group in groups
        ]

    label = f"Heat map: share of channels that each of {len(groups)} groups loses in {len(plans)} plans."
    bottom = below(groups)
    return draw_svg("widths", label, (WIDE, 4 + 34 * len(plans) + bottom), (SIDE, bottom, 4, 4), paint)


def blocks(groups: Sequence[Group]) -> list[tuple[str, int, int, bool]]:
    """Name, first group, number of groups of each block, and whether its name has to stand upright."""
    pixels = (WIDE - SIDE - 4) / len(groups)
    found = []
    start = 0
    for name, run in groupby(section(group["name"]) for group in groups):
        count = len(list(run))
        if (flat := 6.6 * len(name) <= pixels * count) or pixels * count >= 9:
            found.append((name, start, count, not flat))
        else:
            found.append(("", start, count, False))  # too narrow for a line of text
        start += count
    return found


def below(groups: Sequence[Group]) -> int:
    """Pixels that the names of the blocks take."""
    return 14 + max(7 * len(name) if upright else 10 for name, _, _, upright in blocks(groups))


def along_network(axes: Any, groups: Sequence[Group], shaded: bool = True) -> None:
    """The blocks, as bands or with a line between them, their names, and a column per group to point at."""
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks([])
    bottom = axes.get_xaxis_transform()
    for number, (name, start, count, upright) in enumerate(blocks(groups)):
        if not shaded and number:
            axes.axvline(start - 0.5, color=INK, alpha=0.6, linewidth=0.7)
        if shaded and number % 2 == 0:
            axes.axvspan(start - 0.5, start + count - 0.5, color=INK, alpha=0.05, linewidth=0, zorder=0)
        axes.annotate(
            name,
            (start + (count - 1) / 2, 0),
            (0, -6),
            xycoords=bottom,
            textcoords="offset points",
            ha="center",
            va="top",
            rotation=90 if upright else 0,
            fontsize=10,
        )
    add_tips(axes, ((place - 0.5, place + 0.5) for place in range(len(groups))))


def left_plot(document: Mapping[str, Any], plans: Sequence[Plan]) -> Markup:
    """Parameters, MACs and file size left, in percent of the whole model, over the sparsity."""

    def paint(axes: Any) -> Tips:
        places = [0.0, *(100 * plan["sparsity"] for plan in plans)]
        for key, text, colour, style in LEFT:
            shares = [100.0, *(100 * ratio(plan[key], document[key]) for plan in plans)]
            hollow = {"markerfacecolor": "none", "markersize": 9} if key == "bytes" else {}
            axes.plot(places, shares, style, color=colour, label=text, clip_on=False, **hollow)
        axes.set_xlim(0, places[-1] * 1.03)
        axes.set_ylim(0, 104)
        axes.grid()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_xlabel("sparsity")
        axes.legend(loc="lower left")
        return []

    last = plans[-1]
    label = (
        f"Curves of what is left. At {target(last['sparsity'])} sparsity: "
        + ", ".join(f"{percent(ratio(last[key], document[key]))} of the {text}" for key, text, *_ in LEFT)
        + "."
    )
    return draw_svg("left", label, (440, 300), (SIDE, 48, 14, 8), paint)


def sensitivity_plot(measured: Sequence[Group]) -> Markup:
    """Bars of the loss's rise, most sensitive group first."""
    half = LABELLED // 2
    shown = measured if len(measured) <= LABELLED else [*measured[:half], *measured[-half:]]
    gap = 0 if len(shown) == len(measured) else 1

    def paint(axes: Any) -> Tips:
        places = [place + (gap if place >= half else 0) for place in range(len(shown))]
        values = [100 * group["sensitivity"] for group in shown]
        axes.barh(places, values, 0.72, color=[BLUE if value >= 0 else ORANGE for value in values])
        axes.set_yticks(places, [shorten(group["name"]) for group in shown])
        axes.set_ylim(places[-1] + 0.6, -0.6)
        low, high = min(*values, 0.0), max(*values, 0.0)
        margin = 0.16 * ((high - low) or 1)
        axes.set_xlim(low - margin * (low < 0), high + margin)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
        for place, value in zip(places, values, strict=True):
            align, shift = ("left", 4) if value >= 0 else ("right", -4)
            at = dict(xytext=(shift, 0), textcoords="offset points", ha=align, va="center", fontsize=10)
            axes.annotate(f"{value:+.3g} %", (value, place), **at)
        if gap:
            more = f"  … {len(measured) - len(shown)} more, see the table"
            axes.text(0, half, more, va="center", style="italic")
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        return []

    side = 16 + round(6.1 * max(len(shorten(group["name"])) for group in shown))
    first = measured[0]
    label = f"Bar chart of sensitivity. Most sensitive: {first['name']}, {percent(first['sensitivity'])}."
    return draw_svg("sensitivity", label, (440 + side, 34 + 19 * (len(shown) + gap)), (side, 26, 8, 4), paint)
