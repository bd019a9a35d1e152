"""The state of a run whose network lies in pieces: a safetensors file of each process, and one JSON file.

Written and read by torch.distributed.checkpoint in its form without pickles, so that another number of
processes can go on from it.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.digests import sha256_of
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.runtime.processes import Processes

STAGING = "new-pieces"
DIGEST_BYTES = 32
PART_BYTES = 2**28  # of a process in one file, which is put together in memory
Room = Callable[[Mapping[str, torch.Size]], dict[str, torch.Tensor]]


class ShardedState:
    """A `StateFolder` that all processes write and read together; they share its file system.

    Args:
        folder: where states are published.
        processes: of the run.
        room: name -> shape, of what was saved; returns the tensors in pieces that it is read into.
    """

    def __init__(self, folder: StateFolder, processes: Processes, room: Room) -> None:
        self.folder, self.processes, self.room = folder, processes, room

    def begin(self) -> None:
        self.folder.begin()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest state whose checksums hold; see `StateFolder.load`."""
        found = self.folder.newest(self.intact)
        if found is None:
            return None
        path, numbers = found
        reader = HuggingFaceStorageReader(path=str(path))
        saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = self.room({name: tensor.size for name, tensor in saved.items()})
        try:
            load(tensors, storage_reader=reader)
        except CheckpointException as error:
            raise GfpruneError(f"--resume: {path} cannot be read: {first_cause(error)}") from None
        return tensors, numbers

    def intact(self, state: Path, digests: Any) -> Path | None:
        """The state itself if no process finds a file damaged, of those that it looks at."""
        processes = self.processes
        names = sorted(digests) if isinstance(digests, dict) else []
        bad = 0 if names else 1
        for name in names[processes.rank :: processes.count]:
            try:
                bad += digests[name] != sha256_of(state / name)
            except (GfpruneError, OSError):
                bad += 1
        total = processes.total(torch.full((), float(bad), device=processes.device))
        return None if total else state

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Publish a state together; the one before the last is removed.

        Raises:
            GfpruneError: it cannot be written.
        """
        folder, processes = self.folder, self.processes
        staging = folder.folder / STAGING
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if processes.main:
            folder.stage(STAGING, needed)
        processes.wait()
        try:
            parts = file_numbers(tensors, processes.count * PART_BYTES)
            writer = HuggingFaceStorageWriter(str(staging), fqn_to_index_mapping=parts, save_distributed=True)
            save(dict(tensors), storage_writer=writer)
            digests = self.digests(staging)
            if processes.main:
                folder.publish(staging, numbers, digests)
        except CheckpointException as error:
            raise folder.unwritable(first_cause(error), needed) from error
        except OSError as error:
            raise folder.unwritable(error, needed) from error
        finally:
            if processes.main:
                shutil.rmtree(staging, ignore_errors=True)
        processes.wait()

    def digests(self, staging: Path) -> dict[str, str]:
        """SHA-256 of each file, which the processes take in turns."""
        processes = self.processes
        paths = sorted(staging.glob("*.safetensors"))
        table = torch.zeros(len(paths), DIGEST_BYTES, dtype=torch.int32)
        for number in range(processes.rank, len(paths), processes.count):
            table[number] = torch.tensor(list(bytes.fromhex(sha256_of(paths[number]))), dtype=torch.int32)
        found = processes.total(table.to(processes.device)).tolist()
        return {path.name: bytes(row).hex() for path, row in zip(paths, found, strict=True)}


def file_numbers(tensors: Mapping[str, torch.Tensor], limit: int) -> dict[str, int]:
    """Tensor -> the file that it goes to, counted from 1, of so many bytes over all processes."""
    sizes = torch.tensor([tensor.numel() * tensor.element_size() for tensor in tensors.values()])
    files = (sizes.cumsum(0) - sizes) // limit + 1
    return dict(zip(tensors, torch.unique(files, return_inverse=True)[1].add(1).tolist(), strict=True))


def first_cause(error: CheckpointException) -> OSError:
    """What went wrong in the first of the processes that failed, as an error of the system."""
    cause = next(iter(error.failures.values()))[0]
    return cause if isinstance(cause, OSError) else OSError(str(cause).partition("\n")[0])
