"""Tables and plots of `quality.py`."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from provenance import write_page

Entry = dict[str, Any]
PUBLISHED = ("magnitude", "taylor", "random", "diff-pruning")
LABELS = {
    "dense": "dense",
    "gfprune": "**gfprune, defaults**",
    "magnitude": "Torch-Pruning, magnitude",
    "taylor": "Torch-Pruning, Taylor",
    "random": "Torch-Pruning, random",
    "diff-pruning": "Diff-Pruning",
    "diff-pruning, distilled": "control: Diff-Pruning, distilled",
    "gfprune, MACs of the peers": "gfprune at the MACs of the peers (`--budget macs`)",
}
# metric -> what separates a network from its dense original, 0 for none
GAPS: dict[str, Callable[[Entry, Entry], float]] = {
    "loss": lambda entry, dense: entry["loss"] - dense["loss"],
    "ssim": lambda entry, dense: 1 - entry["ssim"],
    "fd_teacher": lambda entry, dense: entry["fd_teacher"],
}
NAMES = {"loss": "denoising loss", "ssim": "1 - SSIM", "fd_teacher": "fd_teacher"}


def mean_and_range(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rows_of(entries: Sequence[Entry], subject: str, sparsity: float) -> dict[str, list[Entry]]:
    """Method -> its runs, one per seed."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        if (entry["subject"], entry["sparsity"]) == (subject, sparsity):
            rows.setdefault(entry["method"], []).append(entry)
    return rows


def gap(runs: Sequence[Entry], dense: Entry, metric: str) -> float:
    return statistics.mean(GAPS[metric](run, dense) for run in runs)


def best_peer(rows: dict[str, list[Entry]], dense: Entry, metric: str) -> str:
    """The published method that leaves the least gap."""
    return min((name for name in rows if name in PUBLISHED), key=lambda name: gap(rows[name], dense, metric))


COLUMNS = (
    "method",
    "seeds",
    "parameters",
    "MACs",
    "gradients",
    "held-out loss",
    "gap, of the best peer's",
    "SSIM",
    "gap, of the best peer's",
    "fd_teacher",
    "of the best peer's",
    "seconds",
)


def table(rows: dict[str, list[Entry]], dense: Entry) -> list[str]:
    best = {metric: gap(rows[best_peer(rows, dense, metric)], dense, metric) for metric in GAPS}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, runs in rows.items():
        shares = {metric: percent(gap(runs, dense, metric) / best[metric]) for metric in GAPS}
        cells = [
            LABELS[name],
            str(len(runs)),
            f"{runs[0]['params'] / dense['params']:.1%}",
            f"{runs[0]['macs'] / dense['macs']:.1%}",
            f"{statistics.mean(run['gradients'] for run in runs):.0f}",
            mean_and_range([run["loss"] for run in runs], 4),
            shares["loss"],
            mean_and_range([run["ssim"] for run in runs], 3),
            shares["ssim"],
            mean_and_range([run["fd_teacher"] for run in runs], 2),
            shares["fd_teacher"],
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def percent(share: float) -> str:
    """A share in whole percent, and never -0%."""
    return f"{round(100 * share)}%"


def bins_table(rows: dict[str, list[Entry]], dense: Entry) -> list[str]:
    """Loss by fifths of the schedule, as a multiple of the dense model's."""
    count = len(dense["bins"])
    edges = [f"{number / count:.1f} to {(number + 1) / count:.1f}" for number in range(count)]
    lines = [f"| method | {' | '.join(edges)} |", "|---|" + "---|" * count]
    lines.append(f"| dense | {' | '.join(f'{value:.5f}' for value in dense['bins'])} |")
    for name, runs in rows.items():
        means = [
            statistics.mean(run["bins"][number] for run in runs) / dense["bins"][number]
            for number in range(count)
        ]
        lines.append(f"| {LABELS[name]} | {' | '.join(f'{value:.2f}x' for value in means)} |")
    return lines


def verdicts(rows: dict[str, list[Entry]], dense: Entry) -> list[str]:
    """What the table says about gfprune's defaults, computed from it."""
    lines = []
    for metric, name in NAMES.items():
        peer = best_peer(rows, dense, metric)
        ours, theirs = gap(rows["gfprune"], dense, metric), gap(rows[peer], dense, metric)
        lines.append(
            f"- {name}: gfprune leaves {ours:.4g} to the dense model, the best peer ({LABELS[peer]}) "
            f"{theirs:.4g}: {percent(ours / theirs)} of it."
        )
    return lines


def plot(entries: Sequence[Entry], path: Path) -> None:
    """One panel per subject, sparsity and metric: the gap that each method leaves, every seed a dot."""
    subjects = list(dict.fromkeys(entry["subject"] for entry in entries))
    sparsities = sorted({entry["sparsity"] for entry in entries} - {0.0})
    panels = [(name, sparsity) for name in subjects for sparsity in sparsities]
    figure, axes = plt.subplots(
        len(panels), len(GAPS), figsize=(12, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for row, (name, sparsity) in zip(axes, panels, strict=True):
        dense = rows_of(entries, name, 0.0)["dense"][0]
        rows = rows_of(entries, name, sparsity)
        for axis, metric in zip(row, GAPS, strict=True):
            for place, (method, runs) in enumerate(rows.items()):
                values = [GAPS[metric](run, dense) for run in runs]
                colour = "#c2410c" if method.startswith("gfprune") else "#64748b"
                axis.barh(place, statistics.mean(values), color=colour, alpha=0.55)
                axis.plot(values, [place] * len(values), ".", color=colour)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.set_yticks(range(len(rows)), [method.replace(", ", ",\n") for method in rows], fontsize=6)
            axis.invert_yaxis()
            axis.set_title(f"{name}, sparsity {sparsity:g}: {NAMES[metric]}, gap to dense", fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


INTRODUCTION = """\
Every run may take {gradients:,} gradients, counted in samples and scoring included. Loss: denoising loss on
images that neither a model nor a run has seen. SSIM: to the dense model's samples from the same noise.
fd_teacher: see `gfprune eval`. {samples} samples of {sample_steps} DDIM steps. Means over the seeds of each
row, lowest and highest in brackets; seconds are of one thread, on a machine that may have been busy. "Of
the best peer's": the gap to the dense model, as a share of the gap that the best published method leaves;
below 0 the network is better than the dense one. Rows are equal in parameters. At equal parameters gfprune
keeps more MACs, because it takes layers whose units matter least and not the same share of each: the row at
the MACs of the peers says what is left of the difference when that freedom is taken away. Distilled peers
are controls, not published methods."""


def section(entries: Sequence[Entry], subject: str) -> list[str]:
    """Everything about one dense model."""
    dense = rows_of(entries, subject, 0.0)["dense"][0]
    lines = ["", f"## {subject}", ""]
    size, macs, loss = dense["params"], dense["macs"], dense["loss"]
    lines.append(f"Dense: {size:,} parameters, {macs:,} MACs, held-out loss {loss:.4f}.")
    for sparsity in sorted({entry["sparsity"] for entry in entries} - {0.0}):
        rows = rows_of(entries, subject, sparsity)
        lines += ["", f"### {subject} at sparsity {sparsity:g}", "", *table(rows, dense), ""]
        lines += [*verdicts(rows, dense), "", "Loss by noise, least first, over that of the dense model:", ""]
        lines += bins_table(rows, dense)
    return lines


def write_report(entries: Sequence[Entry], form: Any, folder: Path, *, command: str) -> Path:
    """`quality.md` and `quality.svg` in a folder.

    Args:
        entries: numbers of every run, the dense models' among them.
        form: how much was run.
    """
    plot(entries, folder / "quality.svg")
    lines = [INTRODUCTION.format(**asdict(form)), "", "![Gap to the dense model by method](quality.svg)"]
    done = sum(entry["method"] != "dense" for entry in entries)
    subjects = len({entry["subject"] for entry in entries})
    planned = subjects * len(form.sparsities) * (form.seeds * len(form.methods) + len(form.once))
    if done < planned:
        lines[:0] = [f"**Not complete:** {done} of {planned} runs had ended when this page was written.", ""]
    for subject in dict.fromkeys(entry["subject"] for entry in entries):
        lines += section(entries, subject)
    return write_page(folder / "quality.md", "Quality, side by side", command, 0, "\n".join(lines))
