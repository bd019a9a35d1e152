"""Which widths the device's kernels like: a small table of measured layer times, and what follows from it.

Kernels cut channels into blocks (16 with AVX-512, 8 with AVX2, tiles of tensor cores) and pad the rest, so
that a width between two multiples can cost as much as the next one. `choose_align` times a few layers of the
network's own geometry at such widths, and takes the finest alignment whose steps still save time.

Example:
    align = choose_align(plan.cost, torch.device("cpu"), torch.float32, report)
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.durable import replacing, write_json
from gfprune_cli.data.cache import cache_room
from gfprune_cli.progress import Event, Report, notice
from gfprune_cli.structure.cost import CostModel

ALIGNMENTS = (32, 16, 8, 4, 1)
GEOMETRIES = 3  # kinds of layers that are timed: those with most of the MACs
BATCH = 8  # at batch 1 PyTorch takes other kernels than a server's batches get
CALL_MACS = {"cpu": 5e7, "cuda": 2e10}  # of one timed call, at most: milliseconds
LARGEST_SIDE = 256  # a tenth of a gigabyte for each of the widths that are timed side by side
ROUNDS = 11  # the least time of so many counts: noise only ever adds
LEAST_WIDTH = 64  # kernels treat a few channels in ways of their own
TYPICAL = 0.75  # of the dense width: where pruned widths lie
REALISED = 0.6  # of the saving that MACs promise: what a step has to save to be worth its alignment
FLAT = 0.1  # a layer whose time changes by less than this over the whole step has no say
TABLE_BYTES = 1 << 20
ISA = "ONEDNN_MAX_CPU_ISA"  # a limit on the vector instructions, which a user may set
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass(frozen=True, order=True)
class Geometry:
    """A kind of layer: `kernel` x `kernel` filters (1: linear) at side x side positions of `batch` samples.

    Args:
        width: channels in and out that are typical of it in the dense network.
        share: of the MACs of the kinds that are timed.
    """

    kernel: int
    width: int
    side: int
    batch: int
    share: float

    def macs(self, width: int) -> float:
        return float(width * width * self.kernel**2 * self.side**2 * self.batch)


def geometries(cost: CostModel, device: torch.device) -> list[Geometry]:
    """The kinds of layers that hold most of the MACs among those that may narrow."""
    totals: dict[tuple[int, int], int] = {}
    widths: dict[tuple[int, int], list[int]] = {}
    for layer in cost.layers:
        narrows = layer.out.shares or layer.into.shares
        if layer.learned and narrows and layer.positions and layer.into.size > 1:
            kind = (1 if layer.weight == 1 else 3, layer.positions)  # other kernels are blocked alike
            totals[kind] = totals.get(kind, 0) + layer.macs(cost.removed({}))
            widths.setdefault(kind, []).append(min(layer.out.size, layer.into.size))
    heaviest = sorted(totals, key=lambda kind: (-totals[kind], kind))[:GEOMETRIES]
    found = []
    for kernel, positions in heaviest:
        width = max(LEAST_WIDTH, *widths[kernel, positions])
        # as large as a call may be, whatever the network's resolution: blocks do not depend on it, noise does
        side = max(4, math.isqrt(int(CALL_MACS[device.type] / (BATCH * kernel**2 * width**2))))
        side = min(side, LARGEST_SIDE)
        share = totals[kernel, positions] / sum(totals[kind] for kind in heaviest)
        found.append(Geometry(kernel, width, side, BATCH, round(share, 6)))
    return found


def steps_of(geometry: Geometry, align: int) -> tuple[int, int, int]:
    """Widths (low, middle, high): the middle one is a multiple of `align`, the others of the coarser one too.

    For `align` 1 the middle is an odd multiple of 2, between multiples of 4.
    """
    half = 2 if align == 1 else align
    turn = max(1, round((geometry.width * TYPICAL / half - 1) / 2))
    middle = half * (2 * turn + 1)
    return middle - half, middle, middle + half


def widths_of(geometry: Geometry) -> list[int]:
    """All widths that a decision needs."""
    return sorted({width for align in ALIGNMENTS[1:] for width in steps_of(geometry, align)})


def layer_call(geometry: Geometry, width: int, device: torch.device, dtype: torch.dtype) -> Any:
    """One call of a layer with as many channels in as out."""
    if geometry.kernel == 1:
        layer: nn.Module = nn.utils.skip_init(nn.Linear, width, width, device=device, dtype=dtype)
        shape: tuple[int, ...] = (geometry.batch * geometry.side**2, width)
    else:
        layer = nn.utils.skip_init(
            nn.Conv2d, width, width, geometry.kernel, padding=geometry.kernel // 2, device=device, dtype=dtype
        )
        shape = (geometry.batch, width, geometry.side, geometry.side)
    for parameter in layer.parameters():  # constants: the process's random numbers stay as they are
        nn.init.constant_(parameter, 0.01)
    inputs = torch.full(shape, 0.01, device=device, dtype=dtype)
    if device.type == "cuda" and geometry.kernel > 1:  # as the network itself is laid out there
        layer = nn.Module.to(layer, memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return lambda: layer(inputs)


def least_times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The least seconds of each call over `ROUNDS` rounds in which the calls take turns, on this thread.

    The time of the thread, not of the clock on the wall: other work on the machine does not count.
    """
    return rounds(calls, time.thread_time)


def rounds(calls: Sequence[Callable[[], object]], now: Callable[[], float]) -> list[float]:
    """The least seconds of each call by the clock `now`."""
    least = [math.inf] * len(calls)
    for number in range(ROUNDS + 1):
        for index, call in enumerate(calls):
            start = now()
            call()
            seconds = now() - start
            if number:  # the first round allocates and chooses kernels
                least[index] = min(least[index], seconds)
    return least


def timer_of(device: torch.device) -> Timer:
    """How calls are timed on a device; on CUDA until the device is done."""

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return partial(rounds, now=now) if device.type == "cuda" else least_times


@contextmanager
def one_thread() -> Iterator[None]:
    """How kernels cut channels does not depend on threads, and one is not disturbed by other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def measure_table(
    layers: Sequence[Geometry], device: torch.device, dtype: torch.dtype, timer: Timer
) -> list[dict[int, float]]:
    """Seconds of one call by width, for each geometry."""
    table = []
    with one_thread():
        for geometry in layers:
            widths = widths_of(geometry)
            times = timer([layer_call(geometry, width, device, dtype) for width in widths])
            table.append(dict(zip(widths, times, strict=True)))
    return table


def realised_saving(geometry: Geometry, times: Mapping[int, float], align: int) -> float | None:
    """The share of the MACs' promise that the first half of a step saves; None if the layer has no say.

    1 where time follows MACs; 0 where the kernel pads the narrower layer to the wider one.
    """
    low, middle, high = steps_of(geometry, align)
    whole = times[high] - times[low]
    if whole < FLAT * times[high]:
        return None
    promised = (geometry.macs(high) - geometry.macs(middle)) / (geometry.macs(high) - geometry.macs(low))
    return min(1.0, max(0.0, (times[high] - times[middle]) / whole / promised))


def decide(layers: Sequence[Geometry], table: Sequence[Mapping[int, float]]) -> int | None:
    """The finest alignment whose steps save time, from coarse to fine; None if no layer has a say."""
    chosen, heard = ALIGNMENTS[0], False
    for align in ALIGNMENTS[1:]:
        votes = [
            (geometry.share, saving)
            for geometry, times in zip(layers, table, strict=True)
            if (saving := realised_saving(geometry, times, align)) is not None
        ]
        if not votes:
            break
        heard = True
        if sum(share * saving for share, saving in votes) < REALISED * sum(share for share, _ in votes):
            break
        chosen = align
    return chosen if heard else None


def default_align(device: torch.device) -> int:
    """What serves where nothing is measured."""
    return 8 if device.type == "cuda" else 4


def choose_align(
    cost: CostModel,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    timer: Timer | None = None,
) -> int:
    """The multiple that widths should be rounded to on this device, from a table that is measured once.

    The table is kept in the cache under everything that it depends on, so that later runs decide alike.

    Args:
        dtype: of the layers that are timed.
        timer: calls -> seconds of each; by default the least of several interleaved rounds.

    Returns:
        One of `ALIGNMENTS`.
    """
    layers = geometries(cost, device)
    if not layers:
        return default_align(device)
    key = table_key(layers, device, dtype)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_room("latency") / f"{digest}.json"
    table = read_table(path, key, layers)
    if table is None:
        report(Event("latency", text="timing layers for --align auto"))
        try:
            table = measure_table(layers, device, dtype, timer or timer_of(device))
        except torch.OutOfMemoryError:
            notice(report, "--align auto: no memory to time layers in; taking the usual alignment")
            return default_align(device)
        finally:
            if device.type == "cuda":  # what follows plans with the memory that is free
                torch.cuda.empty_cache()
        keep_table(path, key, table, report)
    return decide(layers, table) or default_align(device)


def table_key(layers: Sequence[Geometry], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the times depend on."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": 1,
        "instructions": os.environ.get(ISA, ""),
        "dtype": str(dtype),
        "layers": [asdict(geometry) for geometry in layers],
        "rounds": ROUNDS,
    }


def device_name(device: torch.device) -> str:
    """The processor's name and its vector instructions, or the name of the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}"


def processor_name() -> str:
    """What the operating system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read_table(
    path: Path, key: Mapping[str, Any], layers: Sequence[Geometry]
) -> list[dict[int, float]] | None:
    """The table that an earlier run kept; None if there is none, or it is not what this run would measure."""
    try:
        if path.stat().st_size > TABLE_BYTES:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None
        table = [{int(width): float(s) for width, s in times.items()} for times in document["seconds"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    expected = [widths_of(geometry) for geometry in layers]
    sound = all(0 < seconds < math.inf for times in table for seconds in times.values())
    return table if sound and [sorted(times) for times in table] == expected else None


def keep_table(
    path: Path, key: Mapping[str, Any], table: Sequence[Mapping[int, float]], report: Report
) -> None:
    """Put a table into the cache; a cache that cannot be written costs time, never the run."""
    document = {"key": key, "seconds": [{str(w): s for w, s in times.items()} for times in table]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staging:
            write_json(staging, document)
    except OSError as error:
        notice(report, f"layer times were not cached in {path.parent}: {error.strerror}")
