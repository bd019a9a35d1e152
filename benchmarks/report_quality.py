"""The page of `quality.py`: verdicts, what is missing, tables."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from compare import (
    GAPS,
    Rows,
    Verdict,
    best_peer,
    dense_of,
    gap,
    if_finetuned,
    not_finetuned,
    rows_of,
    share,
    verdict,
)
from grid import PUBLISHED, Cell, Entry, Form, Found, peer_of
from plot_quality import TITLES, plot
from provenance import table, write_page
from study import QUALITY, with_range

LABELS = {
    "gfprune": "**gfprune, defaults**",
    "magnitude": "Torch-Pruning, magnitude",
    "taylor": "Torch-Pruning, Taylor",
    "random": "Torch-Pruning, random",
    "diff-pruning": "Diff-Pruning",
}


def label(method: str) -> str:
    return LABELS[peer_of(method)] + method.removeprefix(peer_of(method))


def judged(found: Verdict | None) -> str:
    """A share with its spread over the seeds, and whether it meets the goal."""
    if found is None:
        return "not run"
    word = {None: "", True: ": pass", False: ": **miss**"}[found.passed]
    return with_range(found.mean, found.seeds, 2) + word


def verdicts(
    entries: Sequence[Entry], form: Form, subjects: Sequence[str], among: Callable[[Rows], Rows]
) -> list[str]:
    """One row per network, sparsity and length, beside the peers that `among` leaves."""
    lines = []
    for subject in subjects:
        dense = dense_of(entries, subject)
        for sparsity in form.sparsities:
            for gradients in form.lengths:
                rows = among(rows_of(entries, subject, sparsity, gradients))
                found = [dense and verdict(rows, dense, metric, gradients) for metric in GAPS]
                lines.append([subject, f"{sparsity:g}", f"{gradients:,}", *map(judged, found)])
    return table(("network", "sparsity", "gradients", *TITLES.values()), lines)


COLUMNS = ("method", "seeds", "parameters", "MACs", "gradients", "seconds", "MACs spent")


def methods_table(rows: Rows, dense: Entry) -> list[str]:
    """All methods at one sparsity and length."""
    best = {
        metric: gap(rows[peer], dense, metric) for metric in GAPS if (peer := best_peer(rows, dense, metric))
    }
    lines = []
    for name, runs in rows.items():
        spent = {
            key: statistics.mean(run[key] for run in runs) for key in ("gradients_spent", "seconds", "work")
        }
        line = [
            label(name),
            str(len(runs)),
            f"{max(run['params'] for run in runs) / dense['params']:.1%}",
            f"{max(run['macs'] for run in runs) / dense['macs']:.1%}",
            f"{spent['gradients_spent']:,.0f}",
            f"{spent['seconds']:,.0f}",
            f"{spent['work'] / 1e12:.2f} T",
        ]
        for metric in GAPS:
            values = [run[metric] for run in runs]
            line.append(with_range(statistics.mean(values), values, QUALITY[metric]))
            ratio = share(gap(runs, dense, metric), best[metric]) if metric in best else None
            line.append("" if ratio is None else f"{ratio:.2f}")
        lines.append(line)
    shown = [column for name in ("held-out loss", "SSIM", "fd_teacher") for column in (name, "gap")]
    return table((*COLUMNS, *shown), lines)


def bins_table(rows: Rows, dense: Entry) -> list[str]:
    """Loss by fifths of the schedule, as a multiple of the dense network's."""
    count = len(dense["bins"])
    edges = [f"{number / count:.1f} to {(number + 1) / count:.1f}" for number in range(count)]
    lines = [["dense", *(f"{value:.5f}" for value in dense["bins"])]]
    for name, runs in rows.items():
        means = [statistics.mean(run["bins"][number] for run in runs) for number in range(count)]
        lines.append(
            [label(name), *(f"{mean / own:.2f}x" for mean, own in zip(means, dense["bins"], strict=True))]
        )
    return table(("loss by noise, least first", *edges), lines)


def trials_table(tried: Sequence[Entry], form: Form) -> list[str]:
    """Held-out loss of every optimizer and rate that tuned peers could choose from; the choice in bold."""
    found: dict[tuple[str, ...], dict[tuple[str, float], float]] = {}
    for entry in tried:
        row = (entry["subject"], f"{entry['sparsity']:g}", label(entry["method"]))
        found.setdefault(row, {})[entry["optimizer"], entry["rate"]] = entry["loss"]
    lines = []
    for row, losses in found.items():
        complete = len(losses) == len(form.tunings)
        cells = [
            "not run" if tuning not in losses
            else f"**{losses[tuning]:.4f}**" if complete and losses[tuning] == min(losses.values())
            else f"{losses[tuning]:.4f}"
            for tuning in form.tunings
        ]  # fmt: skip
        lines.append([*row, *cells])
    return table(("network", "sparsity", "peer", *(f"{name} {rate:g}" for name, rate in form.tunings)), lines)


def missing_lines(missing: Sequence[Cell]) -> list[str]:
    """What the page does not say yet, by method, with the number of runs."""
    lines = []
    groups: dict[tuple[str, float, int], Counter[str]] = {}
    for cell in missing:
        groups.setdefault((cell.subject, cell.sparsity, cell.gradients), Counter())[cell.method] += 1
    for (subject, sparsity, gradients), methods in groups.items():
        place = f"{subject} at {sparsity:g}, {gradients:,} gradients" if gradients else subject
        lines.append(f"- {place}: " + "; ".join(f"{name} ({count})" for name, count in methods.items()))
    return lines


INTRODUCTION = """\
Every method removes channels from the same dense network and has the same gradients to spend, counted in
samples, scoring included. Peers keep the widths that their own rule gives, one ratio for all layers, which is
one share of the parameters and another of the MACs. gfprune is asked for one share of both, of four from
the smaller of the peers' two to the larger: the largest whose network keeps no more of either than theirs
do. No row keeps more than the peers by over 1 % of the dense network, of either; gfprune may keep less.

Goals, shares of the gap that the best peer's row leaves to the dense network: held-out loss 0.35, 0.50 and
0.60 at 3,200, 16,000 and 64,000 gradients, 1 - SSIM 0.5, fd_teacher 0.2. The best peer is chosen anew for
every number, after the fact. Ratios of means over the seeds; in brackets the lowest and highest of gfprune's
seeds against the same seed of the peer, or against its mean where that seed has not been run. Below 0 the
network is better than the dense one. The first table is about what each tool gives with its own training;
in the second, `gfprune finetune` trains the peers."""

NOTES = """\
- Loss: denoising loss on images that neither a network nor a run has trained on. SSIM: to the dense network's
  samples from the same noise. fd_teacher: see `gfprune eval`. {samples} samples of {sample_steps} DDIM steps.
- "gap": the row's gap to the dense network, of the best peer's. Means over the seeds of each row, lowest and
  highest in brackets. Where the best peer is better than the dense network no gap is left: 0 for rows that
  are as good, inf for others.
- Peers as published: plain denoising loss, AdamW at {rate:g}, batches of {batch}. Tuned: distilled as
  `gfprune finetune` does it, with plain errors of the output at evenly drawn noise levels
  (`--image-weight 0 --features 0 --timesteps stratified`), and with the optimizer and
  rate of the least held-out loss at {shortest:,} gradients with seed 0, kept for the other seeds and lengths
  of that network and sparsity. That choice sees the held-out images, and its trials are not counted: both to
  the peers' advantage. Finetuned: by `gfprune finetune` with its defaults.
- Seconds: processor time of pruning and training on one thread. MACs spent: an estimate, a backward pass as
  two forward passes, scoring at the dense network's cost, with distillation one forward pass of the dense
  network for each gradient.
- gfprune: `gfprune prune --budget both --recover 0` and `gfprune finetune`, otherwise with their defaults."""


def section(found: Found, form: Form, subject: str) -> list[str]:
    """Everything about one dense network."""
    dense = dense_of(found.entries, subject)
    if dense is None:
        return []
    lines = ["", f"## {subject}", ""]
    size, macs, loss = dense["params"], dense["macs"], dense["loss"]
    lines.append(f"Dense: {size:,} parameters, {macs:,} MACs, held-out loss {loss:.4f}.")
    for sparsity in form.sparsities:
        tables = {length: rows_of(found.entries, subject, sparsity, length) for length in form.lengths}
        done = {length: rows for length, rows in tables.items() if rows}
        for length, rows in done.items():
            title = f"### {subject} at sparsity {sparsity:g}, {length:,} gradients"
            lines += ["", title, "", *methods_table(rows, dense)]
        if done:
            lines += ["", *bins_table(done[max(done)], dense)]
    return lines


def write_report(found: Found, form: Form, folder: Path, *, command: str) -> Path:
    """`quality.md` and `quality.svg` in a folder."""
    subjects = list(
        dict.fromkeys([*(e["subject"] for e in found.entries), *(c.subject for c in found.missing)])
    )
    done, planned = len(found.entries), len(found.entries) + len(found.missing)
    lines = []
    if found.missing:
        lines += [f"**Not complete:** {done} of {planned} runs had ended ([missing](#missing)).", ""]
    alone = verdicts(found.entries, form, subjects, not_finetuned)
    lines += [INTRODUCTION, "", "## Goals", "", "### Beside peers as published and tuned", "", *alone, ""]
    lines += ["### Beside these and peers that `gfprune finetune` has trained", ""]
    lines += [*verdicts(found.entries, form, subjects, if_finetuned), ""]
    if plot(found.entries, form, folder / "quality.svg"):
        lines += ["![Gap to the dense network over gradients](quality.svg)", ""]
    rate, batch = PUBLISHED["learning_rate"], PUBLISHED["batch"]
    notes = NOTES.format(
        samples=form.samples, sample_steps=form.sample_steps, rate=rate, batch=batch, shortest=form.lengths[0]
    )
    lines += ["## How", "", notes]
    commits = sorted({entry["commit"] for entry in found.entries})
    lines.append(f"- Runs were made at commit {', '.join(commits) or 'none yet'}.")
    devices = Counter(entry.get("device", "a CPU") for entry in found.entries)
    lines.append(f"- Devices: {'; '.join(f'{name} ({count} runs)' for name, count in devices.items())}.")
    for subject in subjects:
        lines += section(found, form, subject)
    if found.tried:
        lines += ["", "## What tuned peers chose from", "", *trials_table(found.tried, form)]
    if found.missing:
        lines += ["", "## Missing", "", *missing_lines(found.missing)]
    last = max(form.seeds) - 1
    seeds = f"0 to {last}" if last else 0
    return write_page(folder / "quality.md", "Quality, side by side", command, seeds, "\n".join(lines))
