"""Latency of a network beside a reference's, both timed in turns.

rows = measure_latency(pruned, dense, batches=[1, 64], modes=["eager"], device=device, precision="fp32",
                       mac_ratio=macs(dense) / macs(pruned), repeats=100, progress=silent,
                       inputs=batch_inputs)
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.errors import GfpruneError
from gfprune_cli.evaluation.deepcache import INTERVAL, DeepCache
from gfprune_cli.evaluation.deployment import NetworkInputs, prepare
from gfprune_cli.evaluation.footprint import cycle_macs, macs
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.runtime.device import Precision, as_compiled, autocast, kernels, out_of_memory

WARM_UP = 5  # calls before the first one that counts; compilation happens in them
FEWEST_WARM_UP = 2  # however long they take
FEWEST = 5  # repeats, however long they take
ROW_SECONDS = 2.0  # after which a row that has FEWEST repeats is done
CLOCK = time.perf_counter  # seconds, monotonic
Call = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """Time of one evaluation of the network on one batch.

    Args:
        mode: "eager", "compile" (`torch.compile`), or "deepcache": the model with DeepCache, averaged over a
            cycle of one full and four shallow steps, against the reference without it, both eager.
        batch: images per evaluation.
        ms, ms_reference: medians, milliseconds; the reference's is None without one.
        spread, spread_reference: quartiles, milliseconds.
        speedup: `ms_reference / ms`.
        mac_ratio: MACs of the reference over MACs of the model: the speed-up that MACs alone would promise.
    """

    mode: str
    batch: int
    ms: float
    ms_reference: float | None
    spread: tuple[float, float]
    spread_reference: tuple[float, float] | None
    speedup: float | None
    mac_ratio: float | None


@dataclass(frozen=True)
class Stopwatch:
    """How a row is timed.

    Args:
        device: synchronised before the clock is read.
        repeats: at most so many; fewer, but not under `FEWEST`, once `seconds` have passed.
        seconds: spent on a row, about.
        pulse: called between timed calls; what it raises ends the row.
    """

    device: torch.device
    repeats: int
    seconds: float
    pulse: Call

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return CLOCK()

    def warm_up(self, call: Call) -> None:
        begin = self.now()
        for count in range(WARM_UP):
            self.pulse()
            call()
            if count + 1 >= FEWEST_WARM_UP and self.now() - begin >= self.seconds:
                return

    def measure(self, calls: Sequence[Call]) -> list[list[float]]:
        """Seconds of each call, interleaved: A B, B A, A B, ... so that a slow spell hits all alike."""
        for call in calls:
            self.warm_up(call)
        times: list[list[float]] = [[] for _ in calls]
        begin = self.now()
        for repeat in range(self.repeats):
            order = range(len(calls)) if repeat % 2 == 0 else reversed(range(len(calls)))
            for index in order:
                self.pulse()
                start = self.now()
                calls[index]()
                times[index].append(self.now() - start)
            if repeat + 1 >= FEWEST and self.now() - begin >= self.seconds:
                break
        return times


def measure_latency(
    model: nn.Module,
    reference: nn.Module | None,
    *,
    batches: Sequence[int],
    modes: Sequence[str],
    device: torch.device,
    precision: Precision,
    mac_ratio: float | None,
    repeats: int,
    progress: Progress,
    inputs: NetworkInputs,
) -> list[Latency]:
    """Time the model and the reference in one interleaved run, one row per mode and batch size.

    Runs without gradients, on copies of the networks, with torch's own default kernels (a caller's wish for
    deterministic ones is set aside for the time); NHWC on CUDA; bf16 and fp16 by autocast. A row that fails
    becomes a notice; out of memory halves its batch first.

    Args:
        model: what `ms` is about.
        reference: what it is compared with; None for no comparison.
        batches: images per evaluation.
        modes: of `Latency.mode`.
        mac_ratio: MACs of the reference over those of the model.
        repeats: at most so many per row, at least `FEWEST` or this; see `Stopwatch`.
        inputs: (network, batch) -> keyword arguments of one evaluation.

    Returns:
        The rows that could be measured, in the order asked for.
    """
    wanted = [(mode, batch) for mode in modes for batch in dict.fromkeys(batches)]
    rows: dict[tuple[str, int], Latency] = {}
    networks = [prepare(network, device) for network in (model, reference) if network is not None]
    with kernels(exact=False):
        for number, (mode, batch) in enumerate(wanted):
            pulse = partial(progress, Event("latency", number, len(wanted), f"{mode}, batch {batch}"))
            stopwatch = Stopwatch(device, repeats, ROW_SECONDS, pulse)
            timed = partial(time_row, networks, mode, stopwatch, precision, mac_ratio, inputs)
            row = largest_that_fits(timed, mode, batch, device, progress)
            if row is not None:
                rows.setdefault((row.mode, row.batch), row)
    progress(Event("latency", len(wanted), len(wanted)))
    return list(rows.values())


def largest_that_fits(
    timed: Callable[[int], Latency], mode: str, batch: int, device: torch.device, progress: Progress
) -> Latency | None:
    """One row at the largest batch that fits, None if there is none; the user is told of either."""
    size = batch
    while True:
        try:
            row = timed(size)
        except GfpruneError:
            raise
        except Exception as error:  # a compiler may fail in any way; the other rows are still worth having
            problem = error.with_traceback(None)  # its frames hold the tensors that did not fit
        else:
            if size != batch:
                notice(
                    progress, f"latency ({mode}): batch {batch} does not fit in memory, {size} is measured"
                )
            return row
        if not out_of_memory(problem) or size == 1:
            line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            notice(progress, f"latency ({mode}, batch {size}) is left out: {line}")
            return None
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


def time_row(
    networks: Sequence[Any],
    mode: str,
    stopwatch: Stopwatch,
    precision: Precision,
    mac_ratio: float | None,
    inputs: NetworkInputs,
    batch: int,
) -> Latency:
    """Time the model, and the reference if there is one, at one batch size."""
    steps = 1
    runners = list(networks)
    if mode == "deepcache":
        runners[0], steps = DeepCache(networks[0]), INTERVAL
        if mac_ratio is not None:
            mac_ratio *= steps * macs(networks[0]) / cycle_macs(runners[0])
    elif mode == "compile":
        runners = [as_compiled(network, stopwatch.device) for network in networks]
    calls = [
        partial(runner, **inputs(network, batch), **in_tuples(network))
        for runner, network in zip(runners, networks, strict=True)
    ]
    try:
        with torch.inference_mode(), autocast(stopwatch.device, precision):
            times = stopwatch.measure(calls)
    finally:
        if mode == "compile":
            torch.compiler.reset()  # gives back the memory, and the next row its own graph
    times[0] = [value / steps for value in times[0]]
    (ms, spread), (ms_reference, spread_reference) = latency_row(times[0]), (None, None)
    if len(times) > 1:
        ms_reference, spread_reference = latency_row(times[1])
    speedup = ms_reference / ms if ms_reference is not None and ms > 0 else None
    return Latency(mode, batch, ms, ms_reference, spread, spread_reference, speedup, mac_ratio)


def latency_row(seconds: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles([1000 * value for value in seconds], n=4, method="inclusive")
    return middle, (low, high)
