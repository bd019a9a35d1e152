"""A function in several processes of one run, as a launcher would start them; on the CPU, over gloo.

They are forked from a server that has imported what they need: imports are paid for once.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["gfprune_cli.api", "gfprune_cli.pruning.command", "accelerate", "pipelines"])


def run(
    function: Callable[..., None], count: int, *arguments: Any, limit: int = 240
) -> list[tuple[int, str]]:
    """(exit code, what was raised) of each process, once all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        own, other = FORKING.Pipe(duplex=False)
        given = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        environment = {**os.environ, **given}
        process = FORKING.Process(target=launched, args=(environment, other, function, arguments))
        process.start()
        other.close()
        started.append((process, own))
    found = []
    for process, said in started:
        process.join(limit)
        if process.is_alive():
            process.kill()
        text = ""
        with suppress(EOFError):  # it was killed, or had nothing to say
            text = said.recv()
        found.append((process.exitcode or 0, text))
    return found


def launched(
    environment: dict[str, str], told: Connection, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One of the processes."""
    from gfprune_cli.errors import GfpruneError

    os.environ.update(environment)
    try:
        function(*arguments)
    except GfpruneError as error:
        told.send(f"{type(error).__name__}: {error}")
        os._exit(error.exit_code)
    except BaseException as error:
        told.send(repr(error))
        os._exit(1)
    os._exit(0)
