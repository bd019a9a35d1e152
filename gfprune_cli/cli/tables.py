"""Results as tables for people."""

from rich.table import Table
from rich.text import Text

from gfprune_cli.analysis import Analysis
from gfprune_cli.deploy import ExportResult
from gfprune_cli.pruning import PruneResult

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A count with three significant digits: 1.74 M."""
    for scale, letter in UNITS:
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.0f}"


def change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def prune_table(result: PruneResult) -> Table:
    """Before and after: parameters, MACs, bytes, loss."""
    achieved = f"{result.sparsity['achieved']:.1%} of {result.sparsity['of']} removed"
    title = f"{result.model}: {achieved} ({result.criterion}, {result.layout})"
    table = Table(title=Text(title), title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, pair, unit in (
        ("parameters", result.params, ""),
        ("MACs per image", result.macs, ""),
        ("weight file", result.bytes, "B"),
    ):
        table.add_row(
            name,
            short(pair["before"]) + unit,
            short(pair["after"]) + unit,
            change(pair["before"], pair["after"]),
        )
    before, masked, removed = (result.loss[key] for key in ("before", "masked", "removed"))
    if before is not None and masked is not None and removed is not None:
        table.add_row("denoising loss", f"{before:.4f}", f"{removed:.4f}", change(before, removed))
        table.add_row("  masked, before removal", "", f"{masked:.4f}", change(before, masked))
    return table


def export_table(result: ExportResult) -> Table:
    """Files and their sizes, and the error against the source."""
    what = f"{result.model}: {result.format}, {result.dtype}"
    table = Table(title=Text(what), title_justify="left")
    table.add_column("")
    table.add_column("planned" if result.output is None else "written", justify="right")
    for name, size in result.files.items():
        table.add_row(name, short(size) + "B")
    parity = result.parity
    if parity.max_abs is not None and parity.max_rel is not None:
        table.add_row("largest error", f"{parity.max_abs:.3g}")
        table.add_row("  of the largest output", f"{parity.max_rel:.3g}")
        table.add_row("inputs compared", str(parity.inputs))
    table.add_row("tolerance", f"{parity.tolerance:g}")
    return table


def analysis_text(found: Analysis) -> str:
    """The whole analysis as plain text."""
    rows: list[tuple[str, ...]] = [
        ("channel group", "channels", "unit", "params", "MACs", "members", "sensitivity")
    ]
    for group in found.groups:
        rise = "" if group.sensitivity is None else f"{group.sensitivity:+.1%}"
        rows.append(
            (
                group.name,
                str(group.channels),
                str(group.unit_size),
                short(group.params),
                short(group.macs),
                str(len(group.members)),
                rise,
            )
        )
    if all(group.sensitivity is None for group in found.groups):
        rows = [row[:-1] for row in rows]
    lines = [
        f"{found.model}: {found.class_name}, {found.params:,} parameters, {found.macs:,} MACs per image, "
        f"{found.bytes:,} bytes",
        "",
        *aligned(rows),
    ]
    if found.plan:
        plans: list[tuple[str, ...]] = [("sparsity", "achieved", "params", "MACs", "bytes")]
        plans += [
            (f"{p.sparsity:g}", f"{p.achieved:.4f}", f"{p.params:,}", f"{p.macs:,}", f"{p.bytes:,}")
            for p in found.plan
        ]
        lines += ["", *aligned(plans)]
    return "\n".join(lines)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """First column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
