"""Whether a launcher started this process as one of several; light enough to ask before torch is imported."""

import os
import threading

from gfprune_cli.errors import UsageError

joined = threading.Event()  # the other processes are there: signals are theirs, too


def announced() -> int:
    """How many processes the environment speaks of; 1 where it says nothing, or nothing sensible."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "MASTER_ADDR" in os.environ and size.isdecimal() else 1


def launched() -> bool:
    """Whether `accelerate launch` or `torchrun` made this one of several processes.

    Batch systems leave MASTER_ADDR and WORLD_SIZE in the environment of processes that no launcher started;
    launchers also say which process this is.
    """
    return announced() > 1 and os.environ.get("RANK", "").isdecimal()


def check_launcher() -> None:
    """Refuse to run as one of several where no launcher started the others.

    Raises:
        UsageError: several processes are announced, and this one has no number.
    """
    if announced() > 1 and not launched():
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but RANK is not: no launcher started this one. "
            "Start it with accelerate launch or torchrun, or unset WORLD_SIZE"
        )


def main_process() -> bool:
    """Whether this is the process that speaks."""
    return not launched() or os.environ.get("RANK", "0") == "0"
