"""Finished samples on disk, chunk by chunk: what an interrupted run leaves, and what processes share."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.durable import write_file
from gfprune_cli.outputs.locks import discard, sweep
from gfprune_cli.outputs.tensor_files import load_tensors

IDENTITY = "identity.json"


class SampleStore:
    """A folder of chunks, each one safetensors file that is there whole or not at all.

    Args:
        folder: hidden beside the output, or in the cache.
        identity: what must be equal for a resumed run to draw the same images.
        count: images of each model.
        chunk: images in a file; the last one may hold fewer.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], count: int, chunk: int) -> None:
        self.folder, self.count, self.chunk = folder, count, chunk
        self.identity: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True, default=str))

    @property
    def chunks(self) -> range:
        return range(-(-self.count // self.chunk))

    def members(self, chunk: int) -> range:
        """The images of a chunk, by number."""
        return range(chunk * self.chunk, min(self.count, (chunk + 1) * self.chunk))

    def path(self, role: str, chunk: int) -> Path:
        return self.folder / f"{role}-{chunk:06d}.safetensors"

    def check(self, *, resume: bool, force: bool) -> None:
        """Refuse to mix two runs, or to throw samples away unasked.

        Raises:
            UsageError: the folder holds samples and neither flag says what to do, or they are of another run.
        """
        if not (self.folder / IDENTITY).exists() or (force and not resume):
            return
        if not resume:
            raise UsageError(
                f"an interrupted run left its samples in {self.folder}: "
                "continue it with --resume, or discard it with --force"
            )
        try:
            found = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
            changed = [key for key, value in self.identity.items() if found.get(key) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise GfpruneError(
                f"--resume: {self.folder / IDENTITY} cannot be read: start over with --force"
            ) from error
        if changed:
            raise UsageError(
                f"--resume: the samples in {self.folder} are of a run with other {', '.join(changed)}: "
                "repeat the settings of that run, or start over with --force"
            )

    def begin(self, *, resume: bool) -> None:
        """Make the folder; an empty one, unless it holds an identified run's samples and `resume` is set."""
        sweep(self.folder)
        if not resume or not (self.folder / IDENTITY).exists():
            self.clear()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GfpruneError(f"cannot write samples in {self.folder}: {error.strerror or error}") from error
        write_file(self.folder / IDENTITY, json.dumps(self.identity, sort_keys=True).encode())

    def has(self, role: str, chunk: int) -> bool:
        return self.path(role, chunk).exists()

    def put(self, role: str, chunk: int, images: torch.Tensor) -> None:
        write_file(self.path(role, chunk), save({"images": images.contiguous()}))

    def get(self, role: str, chunk: int) -> torch.Tensor:
        """[N, C, H, W] the images of one chunk.

        Raises:
            GfpruneError: the file is missing or damaged.
        """
        try:
            images = load_tensors(self.path(role, chunk))["images"]
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise GfpruneError(
                f"{self.path(role, chunk)} cannot be read ({error}): remove it and continue with --resume; "
                "processes on several machines need a folder that all of them share"
            ) from error
        return images

    def images(self, role: str) -> Iterator[torch.Tensor]:
        """All images of one model, chunk by chunk."""
        return (self.get(role, chunk) for chunk in self.chunks)

    def clear(self) -> None:
        """Remove the folder: at once, so that a kill leaves no samples without their identity."""
        discard(self.folder)

    def end(self) -> None:
        """Remove the samples, as the results stand; those that stay are no failure.

        The folder goes last, so that it is there until nothing is left to do.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
