"""The processes of one run: which this is, and sums over all of them. One process needs no launcher.

Started by `accelerate launch`, every process computes the gradients of its share of each batch; the sums are
taken here, explicitly, and not by DistributedDataParallel: a process that repeats a step for lack of memory,
or that was told to stop, must not leave the others waiting in the middle of a backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from gfprune_cli.runtime.device import choose_device
from gfprune_cli.runtime.launch import check_launcher, joined, launched

PATIENCE = timedelta(hours=2)  # how long a process waits for another, which may be drawing images


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        state: accelerate's `PartialState`; None for a single process.
        device: of this process.
    """

    state: Any
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Processes":
        """Join the other processes, if there are any.

        Raises:
            UsageError: the device is not available, or the others were never started.
        """
        check_launcher()
        if not launched():
            return cls(None, choose_device(device))
        from accelerate import PartialState

        cpu = choose_device(device).type == "cpu"
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        joined.set()
        return cls(state, state.device)

    @property
    def rank(self) -> int:
        return 0 if self.state is None else int(self.state.process_index)

    @property
    def count(self) -> int:
        return 1 if self.state is None else int(self.state.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """The part of `total` samples that is this process's."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        if self.state is None:
            return tensor
        from accelerate.utils import reduce

        summed: torch.Tensor = reduce(tensor, "sum")
        return summed

    def told(self, value: bool) -> bool:
        """What the main process says."""
        said = self.total(torch.tensor(float(value and self.main), device=self.device))
        return bool(said > 0)

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    def part(self) -> None:
        """Let each process go its own way from here."""
        if self.state is not None:
            self.state.destroy_process_group()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block, then the others: they find what it left in the cache."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()
