"""Tensors that are put aside on a disk while memory is short."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch

from gfprune_cli.outputs.durable import write_tensors
from gfprune_cli.outputs.tensor_files import load_tensors


class Aside(MutableMapping[str, torch.Tensor]):
    """Name -> tensor, each in a file of its own, mapped into memory when it is asked for.

    Args:
        folder: there for nothing else; files of an earlier one in it are overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        path = self.files.setdefault(name, self.folder / f"{len(self.files)}.safetensors")
        write_tensors(path, {"tensor": tensor})

    def __getitem__(self, name: str) -> torch.Tensor:
        return load_tensors(self.files[name])["tensor"]

    def __delitem__(self, name: str) -> None:
        self.files.pop(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
