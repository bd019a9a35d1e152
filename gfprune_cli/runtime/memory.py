"""Memory: what is free, and what tensors take."""

import ctypes
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gfprune_cli.runtime.processes import neighbours

CGROUP = Path("/sys/fs/cgroup")
MMAP_THRESHOLD = -3  # glibc's name of a setting: what is larger is given back when it is let go
LARGE = 2 << 20  # bytes: from 1 MiB on runs took a third longer, from 16 MiB on as much was kept


class Alive(TorchDispatchMode):
    """The most bytes that tensors made within hold at once.

    Args:
        held: tensors that exist already; views of them are not counted.
    """

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return output

    def add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.seen:
            self.seen.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, address, size)

    def gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def available(device: torch.device) -> int:
    """Bytes that are free on a device; for the CPU this process's share of those that no other holds."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min(int(psutil.virtual_memory().available), limit_of_group()) // neighbours()


def keep_nothing_back() -> None:
    """Let this process give large tensors back to the system when they are let go.

    glibc raises its threshold to 32 MiB by itself, and keeps most of what is smaller: a run on the CPU held
    up to twice what its tensors took.
    """
    mallopt = of_c_library("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Give what this process has let go to the system: of small tensors glibc keeps the room."""
    trim = of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def of_c_library(name: str) -> Any:
    """A function of the C library; None where there is none of that name: these are glibc's."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except TypeError:  # there is no C library to ask: Windows
        return None


def limit_of_group() -> int:
    """What the container's memory limit leaves, if there is one."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        return limit - int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
