"""What a network takes whatever the machine's speed: multiply-accumulates and peak memory."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from gfprune_cli.evaluation.deepcache import DeepCache
from gfprune_cli.evaluation.deployment import NetworkInputs, batch_inputs, prepare
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.inputs.signature import in_tuples
from gfprune_cli.progress import Progress, notice
from gfprune_cli.runtime.device import Precision, autocast, out_of_memory
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.trace import Trace, hooked, observe

Call = Callable[[], object]
# What torch says of tensors whose size or number of bytes is no 64-bit integer.
TOO_LARGE = (
    "storage size calculation overflowed",
    "integer multiplication overflow",
    "overflow when unpacking",
)


def peak_memory(
    model: nn.Module,
    *,
    batch: int,
    device: torch.device,
    precision: Precision,
    progress: Progress,
    inputs: NetworkInputs = batch_inputs,
) -> int | None:
    """Bytes that one forward pass needs: weights, buffers, and the peak of what torch allocates above them.

    On CUDA the peak is the caching allocator's own; on the CPU it is added up from the profiler's record of
    every allocation and release, the scratch space inside operators included. Neither counts the input, the
    libraries' code, or another network in the same process.

    Returns:
        The bytes, or None (and a notice) where the pass does not fit in memory.
    """
    network = prepare(model, device)
    resident = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    try:
        call = partial(network, **inputs(network, batch), **in_tuples(network))
        with torch.inference_mode():
            with autocast(device, precision):
                call()  # what is made once and kept is made before counting
            with autocast(device, precision):
                rise = rise_on_cuda(call, device) if device.type == "cuda" else rise_on_cpu(call)
    except (RuntimeError, TypeError, MemoryError) as error:
        if not (out_of_memory(error) or any(words in str(error).lower() for words in TOO_LARGE)):
            raise
        notice(progress, f"peak memory is not measured: a batch of {batch} does not fit")
        return None
    return resident + rise


def rise_on_cuda(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(before)


def rise_on_cpu(call: Call) -> int:
    """The highest running sum of the profiler's memory events: + allocated, - released."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


@torch.no_grad()
def macs(model: nn.Module, inputs: Callable[[nn.Module], dict[str, Any]] = example_inputs) -> int:
    """Multiply-accumulates of one evaluation of the network on one image, as `CostModel` counts them.

    Works on any device, the meta device included, and on networks of uneven widths.

    Args:
        inputs: keyword arguments of the network for one image.
    """
    return counted_macs(model, partial(model, **inputs(model)))


@torch.no_grad()
def cycle_macs(cache: DeepCache) -> int:
    """Multiply-accumulates of one DeepCache cycle on one image."""
    inputs = example_inputs(cache.model)
    full = counted_macs(cache.model, partial(cache.full_step, **inputs))
    return full + (cache.interval - 1) * counted_macs(cache.shallow, partial(cache.shallow_step, **inputs))


def counted_macs(model: nn.Module, call: Call) -> int:
    """Multiply-accumulates of the layers of `model` that a call runs."""
    trace = Trace()
    with hooked(observe(model, trace)):
        call()
    return CostModel(model, (), trace).macs({})
