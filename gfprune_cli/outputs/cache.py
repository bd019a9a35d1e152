"""What was drawn or recorded once, by the hash of everything that decides it."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.outputs.digests import sha256_of_document
from gfprune_cli.outputs.durable import replacing, write_tensors
from gfprune_cli.outputs.locks import sweep_folder
from gfprune_cli.outputs.tensor_files import read_whole
from gfprune_cli.progress import Progress, notice
from gfprune_cli.runtime.processes import Processes

DOCUMENT = "document"
Tensors = dict[str, torch.Tensor]


def cache_folder() -> Path:
    """`$GFPRUNE_CACHE`, else `gfprune` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GFPRUNE_CACHE") or Path(base) / "gfprune")


def cache_room(name: str) -> Path:
    """The folder of one kind of cached things, without what killed runs left unfinished there.

    At every use and not only before a write: a run killed right after it published an entry leaves its
    staging folder beside it, and later runs, which find the entry, have nothing to write.
    """
    folder = cache_folder() / name
    with suppress(OSError):  # cannot be listed: nothing that the run needs
        sweep_folder(folder)
    return folder


def sweep_caches() -> None:
    """The same for all kinds: a run that finds its output done uses none of them."""
    for folder in cache_folder().glob("*"):
        cache_room(folder.name)


def cached(
    key: Mapping[str, Any],
    make: Callable[[], tuple[Tensors, Any]],
    progress: Progress,
    *,
    room: str = "calibration",
    what: str = "calibration images",
    processes: Processes | None = None,
) -> tuple[Tensors, Any]:
    """(tensors, JSON document) that `make` returns, from the cache if a run with the same key left them.

    A cache that cannot be read or written costs time, never the run.

    Args:
        room: its part for things of this kind.
        what: they are, in a message.
        processes: that make them together where one of them does not find them.
    """
    path = cache_room(room) / f"{sha256_of_document(key)}.safetensors"
    known: tuple[Tensors, Any] | None = None
    if path.exists():
        with suppress(Exception):  # truncated or foreign: make it again
            found, metadata = read_whole(path)
            known = found, json.loads(metadata[DOCUMENT])
    if processes is not None and processes.any(known is None):
        known = None
    if known is not None:
        return known
    tensors, document = make()
    if processes is not None and not processes.main:
        return tensors, document
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staging:
            write_tensors(staging, tensors, metadata=(DOCUMENT, json.dumps(document)))
    except OSError as error:
        notice(progress, f"{what} were not cached in {path.parent}: {error.strerror}")
    return tensors, document
