"""Images for calibration, finetuning and evaluation: a folder, an `.npz` file or a Hugging Face dataset.

Example:
    from gfprune_cli.data.images import load_images, to_model_range
    clean = to_model_range(load_images("photos/", size=(32, 32), channels=3, limit=256))
    captions = open_images("photos/", limit=256, about="captions").said
"""

import io
import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from gfprune_cli.data.annotations import TABLES, Kind, annotations
from gfprune_cli.data.dataset_names import looks_like_dataset
from gfprune_cli.data.decoding import DAMAGE, FORMATS, Frames, decoding, reason_of
from gfprune_cli.data.hub_dataset import open_dataset
from gfprune_cli.data.image_source import ImageSource, check_request
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.progress import Progress, notice, silent

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
NPZ_KEYS = ("x", "images", "arr_0")
NPZ_BYTES_LIMIT = 8 * 1024**3
NPZ_RATIO = 200  # of an array to its compressed bytes; deflate reaches 1032, on nothing but zeros
NPZ_BYTES_FREE = 64 * 1024**2  # as much may unpack from anything
NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


def load_images(
    source: str,
    *,
    size: tuple[int, int],
    channels: int,
    limit: int,
    seed: int = 0,
    progress: Progress = silent,
) -> torch.Tensor:
    """Read at most `limit` images, in the model's size and number of channels.

    A folder or `.npz` with more than `limit` images gives a subset drawn from `seed`, in the source's order;
    a dataset gives its first `limit` rows. Images of another size are cropped about their centre to the
    aspect ratio wanted, then resized (Lanczos); one notice says so. Transparency is laid on white.

    Args:
        source: a folder (searched recursively, hidden files left out), an `.npz` file with a uint8 array
            [N, H, W, C] or [N, C, H, W] called `x`, `images` or `arr_0` (H, W, C where both fit), or a
            Hugging Face dataset id (`name` or `owner/name`, if no such path exists; split train, first
            image column, streamed).
        size: height and width in pixels.
        channels: 1 (greyscale) or 3 (RGB).
        limit: the largest number of images to return.
        seed: of the subset.
        progress: receives one "load" event per image and at most one notice.

    Returns:
        uint8 images [N, channels, height, width], 1 <= N <= limit.

    Raises:
        UsageError: no such source, nothing usable in it, or a size, limit or channel count that cannot be.
        GfpruneError: an image, array or row that cannot be read; damaged ones are named, never skipped.
    """
    batches = image_batches(
        source, size=size, channels=channels, limit=limit, batch=limit, seed=seed, progress=progress
    )
    return torch.cat(list(batches))


def image_batches(
    source: str,
    *,
    size: tuple[int, int],
    channels: int,
    limit: int,
    batch: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[torch.Tensor]:
    """What `load_images` returns, in pieces of at most `batch` images: for more than memory holds."""
    check_request(size, channels, limit)
    source_ = open_images(source, limit=limit, seed=seed, progress=progress)
    return source_.batches(size=size, channels=channels, batch=batch, progress=progress)


def open_images(
    source: str, *, limit: int, seed: int = 0, about: Kind | None = None, progress: Progress = silent
) -> ImageSource:
    """A source of images, of which none is read yet; `source`, `limit` and `seed` as in `load_images`.

    Args:
        about: what is wanted beside the images. Where some have it, those without are left out, which a
            notice says.

    Raises:
        UsageError: no such source; GfpruneError: what lies beside the images is damaged.
    """
    # os.path and not pathlib: a name too long or with a null byte is answered, not raised.
    place = os.path.expanduser(source)
    if os.path.exists(place):
        path = Path(place)
        if path.is_dir():
            return _open_folder(source, path, limit, seed, about, progress)
        if path.suffix.lower() == ".npz" and path.is_file():
            array = _read_npz(path)
            chosen = _subset(len(array), limit, seed)
            return ImageSource(source, lambda: _array_frames(path, array, chosen), len(chosen))
        raise UsageError(
            f"--data {source!r} is neither a folder nor an .npz file; for an image, give its folder"
        )
    if looks_like_dataset(source):
        return open_dataset(source, limit, about, progress)
    raise UsageError(f"--data {source!r}: no such folder or .npz file, and not a dataset id (owner/name)")


def _open_folder(
    source: str, path: Path, limit: int, seed: int, about: Kind | None, progress: Progress
) -> ImageSource:
    files = _list_images(path, progress)
    said = annotations(path, files, about) if about else {}
    if said and len(said) < len(files):
        notice(progress, f"{len(files) - len(said)} of {len(files)} images have no {about} and are left out")
        files = [file for file in files if file in said]
    chosen = [files[number] for number in _subset(len(files), limit, seed)]
    texts = tuple(said[file] for file in chosen) if said else None
    classes = tuple(sorted(set(said.values()))) if about == "classes" else None
    return ImageSource(source, lambda: _folder_frames(chosen), len(chosen), texts, classes)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Scale bytes to the range that diffusion models are trained on: x / 127.5 - 1.

    Args:
        images: uint8, any shape.

    Returns:
        float32 of the same shape, in [-1, 1].

    Raises:
        GfpruneError: the images are not uint8 (scaling twice would go unnoticed).
    """
    if images.dtype != torch.uint8:
        raise GfpruneError(f"images must be uint8 to be scaled to [-1, 1], not {images.dtype}")
    return images.to(torch.float32) / 127.5 - 1


def _list_images(folder: Path, progress: Progress) -> list[Path]:
    """The image files of a folder and its subfolders, by relative path with `/`: the same on every system.

    Linked folders are entered, each place once, so that a loop of links ends. What is left out is said.
    """
    # Names that start with a dot are caches and resource forks (`._a.png`), not images.
    files: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise GfpruneError(f"cannot list {str(error.filename)!r}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (name for name in names if not name.startswith(".") and name not in TABLES):
            if name.lower().endswith(SUFFIXES):
                files.append(Path(parent, name))
            else:
                others[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    if not files:
        raise UsageError(f"--data {str(folder)!r}: no image in it (looked for {', '.join(SUFFIXES)})")
    if others:
        kinds = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(others.items()))
        notice(
            progress, f"--data {str(folder)!r}: files that are no images by their names are left out: {kinds}"
        )
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _subset(count: int, limit: int, seed: int) -> list[int]:
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return [int(i) for i in drawn.sort().values]


class _Whole(io.BufferedReader):
    """A file that is never asked for more than it holds: Pillow asks for what a PNG chunk says it is long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 0:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def _folder_frames(files: list[Path]) -> Frames:
    for file in files:
        name = f"image {str(file)!r}"
        if not file.is_file():  # a broken link, or a pipe that would block for ever
            raise GfpruneError(f"{name}: not a regular file; repair or remove it")
        with (
            decoding(name),
            _Whole(io.FileIO(file)) as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            image.load()
        yield name, image


def _array_frames(path: Path, array: npt.NDArray[np.uint8], chosen: list[int]) -> Frames:
    for index in chosen:
        pixels = array[index, :, :, 0] if array.shape[3] == 1 else array[index]
        yield f"image {index} of {str(path)!r}", Image.fromarray(np.ascontiguousarray(pixels))


def _read_npz(path: Path) -> npt.NDArray[np.uint8]:
    """The images of an `.npz` file, [N, H, W, C]."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            key = next((key for key in NPZ_KEYS if f"{key}.npy" in names), None)
            if key is None:
                raise UsageError(f"{str(path)!r} has no array called {' or '.join(NPZ_KEYS)}")
            member = archive.getinfo(f"{key}.npy")
            name = f"array {key!r} of {str(path)!r}"
            _check_member(member, name)
            with archive.open(member) as stream:
                channels_last = _check_header(stream, member.file_size, name)
            with archive.open(member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
    except DAMAGE as error:
        remedy = "write it again with numpy.savez"
        raise GfpruneError(f"{str(path)!r}: not a readable .npz ({reason_of(error)}); {remedy}") from error
    return array if channels_last else array.transpose(0, 2, 3, 1)


def _check_member(member: zipfile.ZipInfo, name: str) -> None:
    """Refuse what would unpack to far more than the file holds; zipfile reads no byte beyond these sizes."""
    if member.file_size > NPZ_BYTES_LIMIT:
        raise UsageError(f"{name} unpacks to more than {NPZ_BYTES_LIMIT} bytes; store fewer images")
    if member.compress_type not in NPZ_METHODS:
        raise GfpruneError(f"{name} is compressed in a way that numpy does not write; use numpy.savez")
    if member.file_size > NPZ_BYTES_FREE and member.file_size > NPZ_RATIO * member.compress_size:
        raise GfpruneError(
            f"{name} unpacks to {member.file_size:,} bytes, over {NPZ_RATIO} times its size: if it really is "
            "that plain, store it with numpy.savez"
        )


def _check_header(stream: IO[bytes], stored: int, name: str) -> bool:
    """Refuse anything but uint8 images before a byte of them is allocated; True for [N, H, W, C]."""
    # Later versions are for headers over 64 kB; a uint8 array's is 118 bytes, and parsing costs stack.
    if np.lib.format.read_magic(stream) != (1, 0):
        raise GfpruneError(f"{name} is not a plain array; save it with numpy.savez")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
    if dtype != np.uint8:
        kind = "Python objects, which are never unpickled" if dtype.hasobject else str(dtype)
        raise UsageError(f"{name} holds {kind}; only uint8 (0 to 255) is accepted, so scale and convert it")
    if len(shape) != 4 or min(shape) < 1 or not {shape[1], shape[3]} & {1, 3, 4}:
        raise UsageError(f"{name} has shape {list(shape)}, not [N, H, W, C] or [N, C, H, W] (C = 1, 3 or 4)")
    if stream.tell() + math.prod(shape) != stored:
        raise GfpruneError(f"{name} is damaged: its size is not that of its shape {list(shape)}")
    return shape[3] in (1, 3, 4)
