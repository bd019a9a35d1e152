"""The plot of `quality.py`: gap to the dense network over gradients."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from compare import GAPS, OURS, dense_of, rows_of
from grid import FINETUNED, TUNED, Entry, Form, peer_of
from matplotlib.ticker import NullLocator

TITLES = {"loss": "held-out loss", "ssim": "1 - SSIM", "fd_teacher": "fd_teacher"}
COLOURS = {OURS: "#c2410c", "magnitude": "#0369a1", "diff-pruning": "#4d7c0f"}
OTHERS = "#94a3b8"
STYLES = {TUNED: "--", FINETUNED: "-."}  # as published: dotted


def plot(entries: Sequence[Entry], form: Form, path: Path) -> bool:
    """A row of panels per network and sparsity, a column per metric; False if there is nothing to show."""
    panels = [
        (subject, sparsity)
        for subject in dict.fromkeys(entry["subject"] for entry in entries)
        for sparsity in form.sparsities
        if any(rows_of(entries, subject, sparsity, length) for length in form.lengths)
    ]
    panels = [(subject, sparsity) for subject, sparsity in panels if dense_of(entries, subject)]
    if not panels:
        return False
    figure, axes = plt.subplots(
        len(panels), len(GAPS), figsize=(11, 2.4 * len(panels)), squeeze=False, layout="constrained"
    )
    for row, (subject, sparsity) in zip(axes, panels, strict=True):
        for axis, metric in zip(row, GAPS, strict=True):
            draw(axis, entries, form, subject, sparsity, metric)
    handles = {
        name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def draw(axis: Any, entries: Sequence[Entry], form: Form, subject: str, sparsity: float, metric: str) -> None:
    """One panel: a line per method through the means, every seed a dot. Gaps of 0 and less lie below it."""
    dense = dense_of(entries, subject)
    assert dense is not None
    by_method: dict[str, dict[int, list[float]]] = {}
    for length in form.lengths:
        for method, runs in rows_of(entries, subject, sparsity, length).items():
            by_method.setdefault(method, {})[length] = [GAPS[metric](run, dense) for run in runs]
    for method, gaps in by_method.items():
        colour = COLOURS.get(peer_of(method), OTHERS)
        means = [statistics.mean(values) for values in gaps.values()]
        style = "-" if method == OURS else next((s for end, s in STYLES.items() if method.endswith(end)), ":")
        axis.plot(list(gaps), means, style, color=colour, linewidth=1.2, marker="_", label=method)
        for length, values in gaps.items():
            axis.plot([length] * len(values), values, ".", color=colour, markersize=4)
    axis.set_xscale("log")
    axis.set_yscale("log", nonpositive="clip")
    axis.set_xticks(form.lengths, [f"{length:,}" for length in form.lengths], fontsize=7)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", which="both", labelsize=7)
    axis.set_title(f"{subject}, sparsity {sparsity:g}: {TITLES[metric]}, gap to dense", fontsize=8)
