"""The device of a run, and how it computes: same seed, same bytes."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gfprune_cli.errors import UsageError
from gfprune_cli.runtime.half import Half, Widened, as_stored, with_parameters

Precision = Literal["fp32", "bf16", "fp16"]


@contextmanager
def kernels(*, exact: bool) -> Iterator[None]:
    """Which kernels torch picks in the block: the caller's settings return.

    Args:
        exact: none that are autotuned or atomic, and no TF32; else those that torch picks by itself.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    saved = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    algorithms = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, exact, not exact, False
    torch.use_deterministic_algorithms(exact, warn_only=exact)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = saved
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])


@contextmanager
def deterministic() -> Iterator[None]:
    """Same seed, same bytes. The caller's settings return.

    Memory that an operator is about to write is not filled first: torch does so to show reads of what was
    never written, at the price of one more pass over every output.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    debugging: Any = torch.utils.deterministic
    filled, debugging.fill_uninitialized_memory = debugging.fill_uninitialized_memory, False
    try:
        with kernels(exact=True):
            yield
    finally:
        debugging.fill_uninitialized_memory = filled


def choose_device(name: str | None) -> torch.device:
    """The device asked for; by default CUDA if there is one.

    Raises:
        UsageError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("masks and scores need float64")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not available here; use cpu, or drop the flag") from error
    return device


def default_precision(device: torch.device) -> Precision:
    """bf16 where the device has it natively, else fp32."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if half else "fp32"


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Passes in half precision where asked for; weights stay as they are."""
    return torch.autocast(device.type, HALF.get(precision), enabled=precision in HALF)


def as_compiled(network: nn.Module, device: torch.device) -> Any:
    """The network under `torch.compile`, as on a server: one graph per shape, replayed as a whole on CUDA."""
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


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


def offload(teacher: nn.Module, device: torch.device, folder: Path | None = None) -> None:
    """Keep the weights of a frozen network elsewhere; each layer visits the device when it is called.

    Args:
        folder: empty, on a disk, where the device has the main memory; None for those that have their own.
    """
    import accelerate

    state = teacher.state_dict()
    halves = frozenset(name for name, weight in state.items() if isinstance(weight, Half))
    if halves:  # what is kept in half precision is so there as well
        weights: Any = {name: as_stored(weight) for name, weight in state.items()}
        del state
        if folder is None:
            weights = {name: weight.cpu() for name, weight in weights.items()}
        else:
            accelerate.utils.offload_state_dict(folder, weights)
            weights = accelerate.utils.OffloadedWeightsLoader(save_folder=folder)
        with_parameters(teacher, lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        accelerate.cpu_offload(teacher, execution_device=device, state_dict=Widened(weights, halves))
    elif folder is None:
        accelerate.cpu_offload(teacher, execution_device=device)
    else:
        accelerate.disk_offload(teacher, folder, execution_device=device)


def is_elsewhere(network: nn.Module) -> bool:
    """Whether the layers of a network visit the device when they are called."""
    return any(parameter.is_meta for parameter in network.parameters())


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name, also of a network that is elsewhere: all of them then come into main memory."""
    if not is_elsewhere(network):
        return dict(network.named_parameters())
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    found: dict[str, torch.Tensor] = get_state_dict_offloaded_model(network)
    return found


def out_of_memory(error: Exception) -> bool:
    """Whether the device, or the host's allocator, had no room."""
    text = str(error).lower()
    said = "not enough memory" in text or "can't allocate memory" in text or "out of memory" in text
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and said
    )
