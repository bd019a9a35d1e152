"""The processes of one run: one, or as many as `accelerate launch` or torchrun started."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from gfprune_cli.device import choose_device

PATIENCE = timedelta(days=1)  # of processes that wait for a slower one


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank, count: which of how many.
        device: of this process.
        wait: until every process is here.
        part: let each process go its own way.
    """

    rank: int
    count: int
    device: torch.device
    wait: Callable[[], None]
    part: Callable[[], None]

    @property
    def first(self) -> bool:
        return self.rank == 0


def join(device: str | None) -> Processes:
    """The processes that the launcher's environment describes.

    Raises:
        UsageError: there is no such device here.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, chosen, lambda: None, lambda: None)
    from accelerate import PartialState

    state = PartialState(cpu=chosen.type == "cpu", timeout=PATIENCE)
    shared = device in (None, "cuda") and chosen.type == "cuda"
    return Processes(
        state.process_index,
        state.num_processes,
        state.device if shared else chosen,
        state.wait_for_everyone,
        state.destroy_process_group,
    )
