"""What `gpu.py` measures of networks: the cost of scoring, latency, and memory."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_networks import process_of, synchronize
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.evaluation.deployment import batch_inputs, prepare
from gfprune_cli.evaluation.footprint import macs, peak_memory
from gfprune_cli.evaluation.latency import ROW_SECONDS, Stopwatch
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.energy import Loss, Way, exact_product, finite_difference_product, gradient, norm
from gfprune_cli.flow.loop import SCORE_CHUNK, scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import silent
from gfprune_cli.pruning.plan import make_plan
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.device import Precision, autocast, deterministic, kernels

REPEATS = 20  # timed calls of each network
Cells = dict[str, float | None]


@dataclass
class Meter:
    """Seconds of a block, and the most bytes that torch held on the device; None on the CPU."""

    seconds: float = 0.0
    peak: int | None = None
    rise: int | None = None  # above what was there before


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    found, before = Meter(), 0
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    try:
        yield found
    finally:
        synchronize(device)
        found.seconds = time.perf_counter() - start
        if device.type == "cuda":
            found.peak = int(torch.cuda.max_memory_allocated(device))
            found.rise = found.peak - before


def cost_of(call: Callable[[], object], device: torch.device, repeats: int) -> Cells:
    """Median seconds and largest rise of memory of a call."""
    meters = []
    for _ in range(repeats):
        with metered(device) as meter:
            call()
        meters.append(meter)
    rises = [meter.rise for meter in meters if meter.rise is not None]
    return {
        "seconds": statistics.median(meter.seconds for meter in meters),
        "rise": max(rises, default=None),
    }


SCORINGS: dict[str, tuple[str, Way | None]] = {
    "magnitude": ("magnitude", None),
    "taylor": ("taylor", None),
    "diff-pruning": ("diff-pruning", None),
    "gradient-flow, finite differences": ("gradient-flow", "finite-difference"),
    "gradient-flow-abs, finite differences": ("gradient-flow-abs", "finite-difference"),
    "gradient-flow-abs, exact product": ("gradient-flow-abs", "exact"),
}
GRADIENT = "one gradient"
PRODUCTS = {
    "Hessian product alone, finite differences": finite_difference_product,
    "Hessian product alone, exact": exact_product,
}
SCORING_ROWS = (GRADIENT, *PRODUCTS, *SCORINGS)


def scoring_costs(model: str, draws: Draws, count: int, repeats: int) -> Iterator[tuple[str, Cells]]:
    """What each criterion costs beside one gradient over the same draws, in chunks as `gfprune prune` takes.

    Args:
        model: folder of the dense checkpoint.
        count: draws of one scoring.

    Yields:
        (row, cells); `error` of a product is its distance to the exact one, relative.
    """
    device = draws.images.device
    plan = make_plan(resolve(model), PruneRecipe(model=model), silent)
    network = gfprune.load(model)
    if device.type == "cuda":
        network = nn.Module.to(network, memory_format=torch.channels_last)
    masked = MaskedModel(nn.Module.to(network, device).requires_grad_(True), plan.groups)
    losses = scoring_losses(masked, process_of(), draws, 1, count, SCORE_CHUNK, silent)
    weights = {name: tensor.detach() for name, tensor in masked.weights.items()}

    def scored(chunks: Sequence[Loss], criterion: Any, way: Way | None) -> object:
        return score(criterion, Evidence(masked, chunks, draws.seed, way))

    with deterministic():
        gradient(losses[:1], weights)
        one = cost_of(lambda: gradient(losses, weights), device, repeats)
        yield GRADIENT, one | shares(one, one)
        _, vector = gradient(losses, weights)
        products = {name: product(losses, weights, vector) for name, product in PRODUCTS.items()}
        exact = products["Hessian product alone, exact"]
        for name, product in PRODUCTS.items():
            found = cost_of(partial(product, losses, weights, vector), device, repeats)
            gap = norm({key: tensor - exact[key] for key, tensor in products[name].items()}) / norm(exact)
            yield name, found | shares(found, one) | {"error": gap}
        del products, exact
        for name, (criterion, way) in SCORINGS.items():
            scored(losses[:1], criterion, way)
            found = cost_of(partial(scored, losses, criterion, way), device, repeats)
            yield name, found | shares(found, one)


def shares(found: Cells, one: Cells) -> Cells:
    """As multiples of one gradient's."""
    found_rise, rise = found["rise"], one["rise"]
    assert found["seconds"] is not None
    assert one["seconds"] is not None
    return {
        "gradients": found["seconds"] / one["seconds"],
        "rises": None if found_rise is None or not rise else found_rise / rise,
    }


class Timing:
    """Latency of several networks in one interleaved run, in bf16 and channels_last on CUDA.

    Args:
        networks: name -> network; the first is what others are compared with.
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, precision: Precision) -> None:
        self.device, self.precision = device, precision
        self.networks = {name: prepare(network, device) for name, network in networks.items()}

    def measure(self, batch: int) -> dict[str, float]:
        """Name -> median milliseconds of one evaluation."""
        calls = [
            partial(network, **batch_inputs(network, batch), return_dict=False)
            for network in self.networks.values()
        ]
        seconds = ROW_SECONDS * len(calls)
        stopwatch = Stopwatch(self.device, REPEATS, seconds, lambda: None)
        with kernels(exact=False), torch.inference_mode(), autocast(self.device, self.precision):
            times = stopwatch.measure(calls)
        return {name: 1000 * statistics.median(row) for name, row in zip(self.networks, times, strict=True)}


def footprint(
    network: nn.Module, batches: Sequence[int], device: torch.device, precision: Precision
) -> Cells:
    """Bytes of the weights, and of one forward pass at each batch size."""
    count = sum(parameter.numel() for parameter in network.parameters())
    found: Cells = {"weights fp32": 4 * count, "weights bf16": 2 * count}
    for batch in batches:
        found[f"pass {batch}"] = peak_memory(
            network, batch=batch, device=device, precision=precision, progress=silent
        )
    return found


def size_of(network: nn.Module) -> Cells:
    return {
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs(network),
    }
