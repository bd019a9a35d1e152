"""Results as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gfprune_cli.carrying.result import CarryResult
from gfprune_cli.deploy.result import ExportResult
from gfprune_cli.pruning.analyze import Analysis, PlanReport
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.recovery.result import FinetuneResult
from gfprune_cli.timing.report import SpeedupReport

WORDS = ("", "component", "output")  # columns
SLOWEST = 10  # layers of a timed network that are named
SIZES = (
    ("parameters", "params", ""),
    ("MACs per image", "macs", ""),
    ("weight file", "bytes", "B"),
    ("peak memory", "memory", "B"),  # of an evaluation
)
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A count with three significant digits: 1.74 M."""
    for scale, letter in UNITS:
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.0f}"


def change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def blank_table(title: str, *columns: str) -> Table:
    """An empty table: columns of words left, of numbers right."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in WORDS else "right")
    return table


def prune_table(result: PruneResult) -> Table:
    """Before and after: parameters, MACs, bytes, loss."""
    shares = (
        f"{result.sparsity['params']:.1%} of parameters and {result.sparsity['macs']:.1%} of MACs removed"
    )
    title = f"{result.model}: {shares} ({result.criterion}, {result.layout})"
    table = blank_table(title, "", "before", "after", "change")
    for name, key, unit in SIZES[:3]:
        before, after = getattr(result, key)["before"], getattr(result, key)["after"]
        table.add_row(name, short(before) + unit, short(after) + unit, change(before, after))
    if result.fold:
        pair = result.fold["params"]
        table.add_row("  by folding", short(pair["before"]), short(pair["after"]), change(**pair))
        table.add_row("  error of outputs", "", f"{result.fold['output_error']:.2%}", "")
    if result.time is not None:
        time_rows(table, result.time)
    if result.limit:
        within = f"{result.limit['loss']:.3f} ± {result.limit['spread']:.3f} of the dense loss"
        table.add_row(f"limit {result.limit['limit']:g}", "", within, f"by {result.limit['stopped_by']}")
    before = result.loss["before"]
    rows = {"masked": "denoising loss, masked", "removed": "  after removal", "recovered": "  after recovery"}
    for key, name in rows.items():
        after = result.loss.get(key)
        if before is not None and after is not None:
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", change(before, after))
    return table


def time_rows(table: Table, time: Mapping[str, Any]) -> None:
    """Milliseconds before and after, and how many times as fast that is."""
    measured, predicted = time["measured"], time["predicted"]
    before, after = (
        (time["dense"]["ms"], predicted["ms"]) if measured is None else (measured["ms_dense"], measured["ms"])
    )
    where = f"time, {time['runtime']}, batch {time['batch']}"
    table.add_row(where, f"{before:.4g} ms", f"{after:.4g} ms", change(before, after))
    asked = ", ".join(f"{name} {value:g}" for name, value in time["asked"].items())
    table.add_row(f"  asked: {asked}", "", "", "")
    table.add_row("  predicted", "", f"{predicted['speedup']:.3f}x", "")
    if measured is not None:
        quartiles = f"{measured['low']:.3f} to {measured['high']:.3f}"
        table.add_row("  measured", "", f"{measured['speedup']:.3f}x", quartiles)


def networks_table(results: Sequence[PruneResult]) -> Table:
    """The networks of one run: of several sparsities, the least first, or of several components."""
    first = results[0]
    if len({result.component for result in results}) > 1:
        return components_table(results)
    columns = ("sparsity", "parameters", "MACs", "weight file", "loss", "after recovery", "output")
    table = blank_table(f"{first.model}: {len(results)} networks of one flow", *columns)
    sizes = [short(pair["before"]) for pair in (first.params, first.macs, first.bytes)]
    table.add_row("dense", *sizes, shown_loss(first.loss["before"]), "", "")
    for result in results:
        table.add_row(
            f"{result.sparsity['target']:g}",
            *(short(pair["after"]) for pair in (result.params, result.macs, result.bytes)),
            shown_loss(result.loss["removed"]),
            shown_loss(result.loss["recovered"]),
            result.output,
        )
    return table


def components_table(results: Sequence[PruneResult]) -> Table:
    """The denoisers of one pipeline, each before and after."""
    columns = ("component", "parameters", "MACs", "weight file", "loss", "after recovery")
    table = blank_table(f"{results[0].model}: {len(results)} components", *columns)
    for result in results:
        sizes = [
            f"{short(pair['before'])} -> {short(pair['after'])}"
            for pair in (result.params, result.macs, result.bytes)
        ]
        losses = [shown_loss(result.loss[key]) for key in ("before", "removed", "recovered")]
        table.add_row(result.component, *sizes, " -> ".join(losses[:2]).removesuffix(" -> "), losses[2])
    return table


def shown_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def finetune_table(result: FinetuneResult) -> Table:
    """Denoising loss before and after, beside the teacher's."""
    title = f"{result.model}: {result.steps} steps, teacher {result.teacher}"
    table = blank_table(title, "", "before", "after", "teacher")
    losses = [result.loss[key] for key in ("before", "after", "teacher")]
    table.add_row("denoising loss", *map(shown_loss, losses))
    before, after, teacher = losses
    if before is not None and after is not None and teacher is not None and before > teacher:
        table.add_row("share of the gap closed", "", f"{(before - after) / (before - teacher):.0%}", "")
    return table


def eval_table(document: Mapping[str, Any]) -> Table:
    """Metrics, then size and latency, of the model and its reference."""
    against = f" against {document['reference']}" if document["reference"] else ""
    table = blank_table(f"{document['model']}{against}", "", "model", "reference", "95 % interval")
    metrics = document["metrics"]
    for name, metric in metrics.items():
        if name.endswith("_reference"):
            continue
        other = metrics.get(f"{name}_reference")
        interval = metric["ci95"]
        table.add_row(
            name,
            figure_cell(metric["value"]),
            figure_cell(other["value"]) if other else "",
            f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "",
        )
    for name, key, unit in SIZES:
        pair = [document[key][role] for role in ("model", "reference")]
        if pair[0] is not None:
            table.add_row(name, *(short(value) + unit if value is not None else "" for value in pair), "")
    for row in document["latency"]:
        faster = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        reference = f"{row['ms_reference']:.3g} ms" if row["ms_reference"] is not None else ""
        table.add_row(f"{row['mode']}, batch {row['batch']}", f"{row['ms']:.3g} ms", reference, faster)
    return table


def figure_cell(value: float | None) -> str:
    return "equal" if value is None else f"{value:.4g}"


def export_table(result: ExportResult) -> Table:
    """Files and their sizes, and the error against the source."""
    written = "planned" if result.output is None else "written"
    table = blank_table(f"{result.model}: {result.format}, {result.dtype}", "", written)
    for name, size in result.files.items():
        table.add_row(name, short(size) + "B")
    parity = result.parity
    if parity.max_abs is not None and parity.max_rel is not None:
        table.add_row("largest error", f"{parity.max_abs:.3g}")
        table.add_row("  of the largest output", f"{parity.max_rel:.3g}")
        table.add_row("inputs compared", str(parity.inputs))
    table.add_row("tolerance", f"{parity.tolerance:g}")
    return table


def carry_table(result: CarryResult) -> Table:
    """What became of the layers of an adapter."""
    written = "planned" if result.output is None else "written"
    table = blank_table(f"{result.adapter}: {result.kind} for {result.model}", "", written)
    for name, count in result.layers.items():
        table.add_row({"total": "layers"}.get(name, f"  {name}"), str(count))
    table.add_row("size before", short(result.bytes["before"]) + "B")
    table.add_row("size after", short(result.bytes["after"]) + "B")
    return table


def analysis_text(found: Analysis) -> str:
    """The whole analysis as plain text."""
    rows: list[tuple[str, ...]] = [
        ("channel group", "channels", "unit", "params", "MACs", "members", "sensitivity")
    ]
    for group in found.groups:
        rise = "" if group.sensitivity is None else f"{group.sensitivity:+.1%}"
        sizes = (str(group.channels), str(group.unit_size), short(group.params), short(group.macs))
        rows.append((group.name, *sizes, str(len(group.members)), rise))
    if all(group.sensitivity is None for group in found.groups):
        rows = [row[:-1] for row in rows]
    lines = [
        f"{found.model}: {found.class_name}, {found.params:,} parameters, {found.macs:,} MACs per image, "
        f"{found.bytes:,} bytes",
        "",
        *aligned(rows),
    ]
    if found.plan:
        plans: list[tuple[str, ...]] = [("sparsity", "of params", "of MACs", "params", "MACs", "bytes")]
        plans += [(f"{p.sparsity:g}", *left_cells(p), f"{p.bytes:,}") for p in found.plan]
        lines += ["", *aligned(plans)]
    if found.speedups:
        lines += ["", *aligned(speedup_rows(found))]
    if found.time is not None:
        slowest = sorted(found.time["layers"], key=lambda layer: -layer["ms"])[:SLOWEST]
        rows = [("slowest layers", "ms", "share of time", "share of MACs")]
        for layer in slowest:
            shares = (layer["ms"] / found.time["ms"], layer["macs"] / found.macs)
            rows.append((layer["name"], f"{layer['ms']:.3f}", *(f"{share:.1%}" for share in shares)))
        where = found.time["where"]
        lines += [
            "",
            f"{found.time['ms']:.4g} ms in {where.get('runtime')}, batch {where.get('batch')}, on "
            f"{where.get('device')}; {found.time['launching']:.0%} of it is launching operators",
            "",
            *aligned(rows),
        ]
    return "\n".join(lines)


def speedup_rows(found: Analysis) -> list[tuple[str, ...]]:
    """What each speed-up would leave."""
    rows: list[tuple[str, ...]] = [("speedup", "predicted", "ms", "of params", "of MACs", "params", "MACs")]
    rows += [(f"{p.speedup:g}", f"{p.achieved:.3f}", f"{p.ms:.4g}", *left_cells(p)) for p in found.speedups]
    return rows


def left_cells(plan: PlanReport | SpeedupReport) -> tuple[str, ...]:
    """The shares of parameters and MACs that a plan removes, then their numbers that are left."""
    shares = (f"{plan.removed[key]:.4f}" for key in ("params", "macs"))
    return (*shares, f"{plan.params:,}", f"{plan.macs:,}")


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """First column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
