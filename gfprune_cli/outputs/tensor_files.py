"""Tensors from safetensors files, mapped into memory, or read where the file system cannot map files."""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, load_file

# ENODEV, of FUSE, mergerfs, Ceph and some network drives; safetensors gives the number in words alone
_CANNOT_MAP = ("os error 19", "No such device")


@contextmanager
def opened(path: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A file whose tensors are read one at a time: name -> tensor.

    Raises:
        OSError, SafetensorError: as safetensors.
    """
    try:
        reader: Any = safetensors.safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        if not cannot_map(error):
            raise
        yield _whole(path).__getitem__
        return
    with reader as mapped:
        yield mapped.get_tensor


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name.

    Raises:
        OSError, SafetensorError: as safetensors.
    """
    try:
        return load_file(path)
    except OSError as error:
        if not cannot_map(error):
            raise
        return _whole(path)


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file by name, and its metadata.

    Raises:
        OSError, SafetensorError: as safetensors.
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return load_tensors(path), header.get("__metadata__", {})


def _whole(path: Path) -> dict[str, torch.Tensor]:
    return load(path.read_bytes())


def cannot_map(error: BaseException) -> bool:
    """Whether a library failed because the file system cannot map files into memory."""
    return any(words in str(error) for words in _CANNOT_MAP)
