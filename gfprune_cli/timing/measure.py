"""Measure the times of a network: its layers alone, then whole networks for what lies between them."""

import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gfprune_cli.checkpoint.record import as_json, installed_tools, installed_version
from gfprune_cli.outputs.cache import cached
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.runtime.device import device_name
from gfprune_cli.structure.cost import TIME, CostModel
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.removal import stock_config
from gfprune_cli.structure.times import BLOCKS, NONE, Floats, Padding
from gfprune_cli.timing.kinds import ATTENTION, Kind, Run, layers_run
from gfprune_cli.timing.runtimes import RUNTIMES, Bench
from gfprune_cli.timing.stopwatch import Reading, times_as_fast
from gfprune_cli.timing.table import Points, TimeTable, table_of
from gfprune_cli.timing.whole import whole_networks

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the widest layer of a kind
NARROW = (0.5, 0.25)  # width ratios of the whole networks
TRUST = 0.05  # in the times of layers alone, beside those of whole networks


def where(bench: Bench) -> dict[str, Any]:
    """What decides the times of a network beside itself."""
    versions = {name: installed_version(name) for name in RUNTIMES[bench.runtime].packages}
    size = [bench.sizes.height, bench.sizes.width]
    return {
        "device": device_name(bench.device),
        "runtime": bench.runtime,
        "precision": bench.precision,
        "batch": bench.batch,
        "size": None if size == [None, None] else size,
        "threads": torch.get_num_threads() if bench.device.type == "cpu" else None,
        "processors": os.cpu_count(),
        "system": platform.machine(),
        "versions": {**installed_tools(), **versions},
    }


def network_digest(network: nn.Module) -> str:
    """SHA-256 of the class and configuration of a network."""
    said = {"class": type(network).__name__, "config": as_json(stock_config(network))}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def time_table(network: nn.Module, cost: CostModel, bench: Bench, progress: Progress) -> TimeTable:
    """The times of a network, from the cache if they were measured here before.

    Args:
        network: its structure; on the meta device is enough.

    Raises:
        UsageError: the runtime is not here.
        GfpruneError: there is no room for it.
    """
    RUNTIMES[bench.runtime].require(bench)
    RUNTIMES[bench.runtime].require_room(bench, network)
    key = {
        "where": where(bench),
        "network": network_digest(network),
        "grid": [*SHARES, *BLOCKS],
        "groups": {name: [group.channels, group.step] for name, group in cost.groups.items()},
    }

    def make() -> tuple[dict[str, torch.Tensor], Any]:
        return {}, measured_table(network, cost, bench, progress).document()

    _, document = cached(key, make, progress, room="times", what="times of layers")
    return table_of(document, "a cached table")


def measured_table(network: nn.Module, cost: CostModel, bench: Bench, progress: Progress) -> TimeTable:
    runs = layers_run(network, bench.inputs(network))
    kinds = measured_kinds(cost, runs, bench, progress)
    table = TimeTable(where(bench), network_digest(network), kinds, 1.0, 0.0, 0.0, (1.0, 0.0, 0.0), True)
    widths = [narrow_widths(cost.groups.values(), share) for share in (1.0, *NARROW)]
    with whole_networks(cost, bench, progress, network) as timed:
        seconds = timed(widths[1:])
    dense = Reading.of(seconds[0]).in_milliseconds()
    table.attach(cost, runs)
    alone = np.array([cost.total(kept, TIME) for kept in widths])
    scale, per_number, per_layer = fitted(
        alone,
        np.array([numbers_put_out(cost, runs, kept) for kept in widths]),
        len(runs),
        np.array([1e3 * float(np.median(times)) for times in seconds]),
    )
    steady = all(times_as_fast(seconds[0], other).steady for other in seconds[1:])
    if not steady:
        notice(progress, "the machine is busy: times vary by more than 1 %, which widths are chosen by")
    spread = (dense.value, dense.low, dense.high)
    return TimeTable(table.where, table.network, kinds, scale, per_number, per_layer, spread, steady)


def measured_kinds(
    cost: CostModel, runs: Mapping[str, Run], bench: Bench, progress: Progress
) -> dict[str, Points]:
    """The times of every kind of layer that runs, at some of its widths."""
    widths: dict[Kind, tuple[set[int], set[int]]] = {}
    free: dict[Kind, list[bool]] = {}
    for layer in cost.layers:
        run = runs.get(layer.name)
        if run is not None and run.kind is not None:
            for side, dimension in enumerate((layer.out, layer.into)):
                widths.setdefault(run.kind, (set(), set()))[side].add(dimension.size)
                free.setdefault(run.kind, [False, False])[side] |= bool(dimension.shares)
    found = {}
    for number, (kind, sizes) in enumerate(widths.items()):
        progress(Event("time", number, len(widths), text=kind.label))
        out, into = (points(kind, *pair) for pair in zip(sizes, free[kind], strict=True))
        if kind.operator in (ATTENTION, "depthwise"):
            into = [1]
        ms: list[list[float]] = []
        for o in out:
            progress(Event("time"))  # a signal may arrive in here
            ms.append([1e3 * bench.layer_seconds(kind, o, i) for i in into])
        grid = Points(*doubled(out, into, ms))
        paddings = [
            padding(kind, grid, side, bench)
            if free[kind][side] and kind.operator in ("conv", "linear")
            else NONE
            for side in (0, 1)
        ]
        found[kind.label] = replace(grid, out_padding=paddings[0], into_padding=paddings[1])
    return found


def padding(kind: Kind, grid: Points, side: int, bench: Bench) -> Padding:
    """How far widths between blocks of channels cost what the next block costs.

    Measured in the middle of the grid, at half of a block less and at nearly all of it; the table says what
    width takes as long.

    Args:
        side: 0 for outputs, 1 for inputs.
    """
    small, large = BLOCKS
    axes = grid.out, grid.into
    row = len(axes[1 - side]) // 2
    inner = [width for width in axes[side][1:] if width % large == 0 and width > large]
    if not inner:
        return NONE
    ms = grid.grid(1.0).ms
    along = ms[:, row] if side == 0 else ms[row]
    whole = inner[len(inner) // 2]

    def seen(width: int) -> float:
        """The width that takes as long."""
        pair = (width, axes[1][row]) if side == 0 else (axes[0][row], width)
        took = 1e3 * bench.layer_seconds(kind, *pair)
        return float(np.interp(took, along, axes[side]))

    half, little = whole - small, whole - large + 1
    to_large = share_of((seen(half) - half) / small)
    return share_of((seen(little) - little - small * to_large) / (small - 1)), to_large


def share_of(part: float) -> float:
    return min(1.0, max(0.0, part))


def points(kind: Kind, sizes: Iterable[int], free: bool) -> list[int]:
    """Widths to measure: those that there are where none may narrow, else shares of the widest."""
    if not free:
        return sorted(sizes)
    widest = max(sizes)
    multiple = BLOCKS[widest >= 2 * BLOCKS[1]]
    step = max(kind.groups, kind.head or multiple)
    return sorted(
        {max(min(step, widest), round(widest * share / step) * step) for share in SHARES} | {widest}
    )


def doubled(
    out: list[int], into: list[int], ms: list[list[float]]
) -> tuple[list[int], list[int], list[list[float]]]:
    """A grid of two points at least, each way."""
    if len(into) == 1:
        into, ms = [*into, into[0] + 1], [[*row, *row] for row in ms]
    return (out, into, ms) if len(out) > 1 else ([*out, out[0] + 1], into, ms * 2)


def narrow_widths(groups: Iterable[ChannelGroup], share: float) -> dict[str, int]:
    """Every group at one ratio of its width, as its steps allow; blocks stay."""
    return {
        group.name: group.channels
        if group.is_block
        else min(group.channels, max(1, round(group.channels * share / group.step)) * group.step)
        for group in groups
    }


def numbers_put_out(cost: CostModel, runs: Mapping[str, Run], kept: Mapping[str, int]) -> float:
    """How many numbers all layers put out."""
    removed = cost.removed(kept)
    return float(
        sum(runs[layer.name].places * layer.out.kept(removed) for layer in cost.layers if layer.name in runs)
    )


def fitted(alone: Floats, numbers: Floats, layers: int, whole: Floats) -> tuple[float, float, float]:
    """What makes the times of layers alone those of whole networks.

    Args:
        alone: [networks] summed times of layers.
        numbers: [networks] that the layers put out.
        layers: of each network.
        whole: [networks] measured.

    Returns:
        (factor of `alone`, time per number, time per layer), none of them negative: least squares of relative
        errors, with a factor near 1 as far as the networks leave it open.
    """
    columns = np.stack([alone, numbers, np.full(len(alone), float(layers))], 1)
    sizes = columns.max(0)
    system = np.vstack([columns / sizes / whole[:, None], [TRUST / sizes[0], 0, 0]])
    goal = np.append(np.ones(len(alone)), TRUST)
    best, least = np.zeros(3), float("inf")
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        part = np.zeros(3)
        part[list(chosen)] = np.linalg.lstsq(system[:, chosen], goal, rcond=None)[0]
        missed = float(((system @ part - goal) ** 2).sum())
        if (part >= 0).all() and missed < least:
            best, least = part, missed
    scale, per_number, per_layer = best / sizes
    return float(scale), float(per_number), float(per_layer)
