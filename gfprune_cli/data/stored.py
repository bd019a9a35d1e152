"""Images that stay on disk until a batch of them is asked for."""

import hashlib
import io
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import IO, overload

import torch

from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.cache import cache_folder

PIECE = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class StoredImages:
    """Images [N, ...] in a file without a name, whose room is free again when the process ends in any way.

    Indexed like a tensor: by a slice, which reads nothing, or by a tensor of positions.

    Args:
        file: of images of equal size, one after the other.
        stored: type of the numbers in it.
        sample: shape of one image.
        rows: which of them these are.
        scale: from what is stored to what a network sees, float32.
    """

    file: IO[bytes]
    stored: torch.dtype
    sample: torch.Size
    rows: range
    scale: Callable[[torch.Tensor], torch.Tensor]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.sample))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, chosen: slice) -> "StoredImages": ...
    @overload
    def __getitem__(self, chosen: torch.Tensor) -> torch.Tensor: ...
    def __getitem__(self, chosen: slice | torch.Tensor) -> "StoredImages | torch.Tensor":
        if isinstance(chosen, slice):
            return replace(self, rows=self.rows[chosen])
        size = self.sample.numel() * self.stored.itemsize
        pieces = bytearray()
        for number in chosen.tolist():
            self.file.seek(self.rows[number] * size)
            pieces += self.file.read(size)
        found = torch.frombuffer(pieces, dtype=self.stored).view(len(chosen), *self.sample)
        return self.scale(found)

    def whole(self) -> torch.Tensor:
        """All of them, in memory."""
        return self[torch.arange(len(self))]

    def fingerprint(self) -> str:
        """What `outputs.digests.fingerprint` says of all that is stored."""
        size = self.file.seek(0, io.SEEK_END)
        count = size // (self.sample.numel() * self.stored.itemsize)
        digest = hashlib.sha256(f"{(count, *self.sample)}\n".encode())
        self.file.seek(0)
        for _ in range(math.ceil(size / PIECE)):
            digest.update(self.file.read(PIECE))
        return digest.hexdigest()


def store_images(
    batches: Iterable[torch.Tensor], scale: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
) -> StoredImages:
    """Images that come in batches [n, ...], kept in the cache folder; in memory where that cannot be written.

    Args:
        batches: at least one, all of one type and shape, on the CPU.

    Raises:
        GfpruneError: the disk is full.
    """
    folder, coming = cache_folder(), iter(batches)
    first = next(coming)  # images that are refused leave no folder behind
    file: IO[bytes]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed with the last who knows it
    except OSError:
        file = io.BytesIO()
    count = 0
    for batch in itertools.chain([first], coming):
        try:
            file.write(batch.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()  # or what does not fit would show when it is read
        except OSError as error:
            raise GfpruneError(
                f"{folder} has no room for the images of this run ({error.strerror}): free some, or name"
                " another folder by GFPRUNE_CACHE"
            ) from error
        count += len(batch)
    return StoredImages(file, batch.dtype, batch.shape[1:], range(count), scale)


def in_memory(images: torch.Tensor | StoredImages) -> torch.Tensor:
    """Images as one tensor."""
    return images.whole() if isinstance(images, StoredImages) else images
