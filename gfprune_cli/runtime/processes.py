"""The processes of one run: which this is, and sums over all of them. One process needs no launcher.

Started by `accelerate launch`, every process computes the gradients of its share of each batch; the sums are
taken here, explicitly, and not by DistributedDataParallel: a process that repeats a step for lack of memory,
or that was told to stop, must not leave the others waiting in the middle of a backward pass.

All processes do the same in the same order. What one of them computes alone comes to the others as a sum, to
which those that have nothing to say add zeros.
"""

import json
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError

from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.progress import Event, Progress
from gfprune_cli.runtime.device import choose_device
from gfprune_cli.runtime.launch import check_launcher, joined, launched, sharding

PARCEL = 1 << 22  # numbers that are summed together
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
    def start(cls, device: str | None, *, shards: bool = False) -> "Processes":
        """Join the other processes, if there are any.

        Args:
            shards: whether the command can work with a network in pieces.

        Raises:
            UsageError: the device is not available, or the others were never started.
        """
        check_launcher(shards=shards)
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

    @property
    def sharded(self) -> bool:
        """Whether networks lie in pieces over the processes."""
        return self.state is not None and sharding()

    def share(self, total: int) -> range:
        """The part of `total` samples that is this process's."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes.

        Raises:
            GfpruneError: another process has ended.
        """
        if self.state is None:
            return tensor
        from accelerate.utils import reduce

        with lost_process():
            summed: torch.Tensor = reduce(tensor.to(self.device), "sum")
        return summed.to(tensor.device)

    def totals(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums of tensors of one type, many small ones taken together."""
        if self.state is None:
            return dict(tensors)
        found: dict[str, torch.Tensor] = {}
        for names in parcels(tensors):
            flat = [tensors[name].flatten() for name in names]
            parts = self.total(torch.cat(flat)).split([len(part) for part in flat])
            found |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
        return found

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """[sum of N, ...] the rows [N, ...] of all processes, in the order of their numbers."""
        if self.state is None:
            return rows
        lengths = torch.zeros(self.count, dtype=torch.long)
        lengths[self.rank] = len(rows)
        ends = self.total(lengths).cumsum(0).tolist()
        whole = rows.new_zeros(ends[-1], *rows.shape[1:])
        whole[ends[self.rank] - len(rows) : ends[self.rank]] = rows
        return self.total(whole)

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        return int(self.joined(torch.tensor([number])).min())

    def align(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes the main one's: other devices may have rounded otherwise."""
        if self.state is not None:
            from accelerate.utils import broadcast

            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().to(self.device).contiguous()))

    def told(self, value: bool) -> bool:
        """What the main process says."""
        return self.any(value and self.main)

    def any(self, value: bool) -> bool:
        """Whether some process says so."""
        return bool(self.total(torch.tensor(float(value), device=self.device)) > 0)

    def said(self, value: Any) -> Any:
        """What the main process found: strings, numbers, lists and dictionaries of them."""
        if self.state is None:
            return value
        text = json.dumps(value).encode() if self.main else b""
        told = self.joined(torch.tensor(list(text), dtype=torch.uint8))
        return value if self.main else json.loads(bytes(told.tolist()))

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    def part(self) -> None:
        """Let each process go its own way from here."""
        if self.state is not None:
            self.state.destroy_process_group()

    def main_first(self) -> AbstractContextManager[None]:
        """The main process runs the block, then the others: they find what it left in the cache."""
        return nullcontext() if self.state is None else self.state.main_process_first()


ALONE = Processes(None, torch.device("cpu"))  # of what no other process shares


def parcels(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names in order, of about `PARCEL` numbers together, or of one tensor that has more."""
    names: list[str] = []
    numbers = 0
    for name, tensor in tensors.items():
        if names and numbers + tensor.numel() > PARCEL:
            yield names
            names, numbers = [], 0
        names.append(name)
        numbers += tensor.numel()
    if names:
        yield names


@contextmanager
def lost_process() -> Iterator[None]:
    """Say in one line that a process of the run is gone, where a library says what became of its sockets.

    With NCCL a process waits until the launcher ends it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise GfpruneError(
            "another process of the run ended, or cannot be reached: see what it said, and continue with "
            "--resume"
        ) from error


class Together:
    """A progress callback that keeps an interrupt until all processes agree on it; see `agree`.

    Args:
        progress: what it calls, which may raise `Interrupted`.
    """

    def __init__(self, progress: Progress, processes: Processes) -> None:
        self.progress, self.processes = progress, processes
        self.stop: Interrupted | None = None

    @classmethod
    def of(cls, progress: Progress, processes: Processes) -> "Together":
        """The callback itself if it is one."""
        return progress if isinstance(progress, cls) else cls(progress, processes)

    def __call__(self, event: Event) -> None:
        try:
            self.progress(event)
        except Interrupted as stop:
            self.stop = stop

    def interrupt(self) -> Interrupted:
        """What to raise once the processes know that one was told to stop."""
        return self.stop or Interrupted("stopped with another process", signal.SIGTERM)

    def agree(self) -> None:
        """Stop here if some process was told to; all of them ask in the same places.

        Raises:
            Interrupted: one was.
        """
        if self.processes.any(self.stop is not None):
            raise self.interrupt()


def agree(progress: Progress) -> None:
    """Stop here, together, if some process was told to; all of them call it in the same places.

    Raises:
        Interrupted: one was.
    """
    if isinstance(progress, Together):
        progress(Event("pass"))
        progress.agree()


def neighbours() -> int:
    """Processes of this run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
