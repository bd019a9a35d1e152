"""Images for calibration, finetuning and evaluation: a folder, an `.npz` file or a Hugging Face dataset.

Example:
    from gfprune_cli.data.images import load_images, to_model_range
    clean = to_model_range(load_images("photos/", size=(32, 32), channels=3, limit=256))
"""

import importlib
import io
import lzma
import math
import os
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from gfprune_cli.data.dataset_names import check_dataset, looks_like_dataset, missing_offline
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.progress import Event, Progress, notice, silent

_Errors = tuple[type[Exception], ...]
_Frames = Iterator[tuple[str, Image.Image]]
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
NPZ_KEYS = ("x", "images", "arr_0")
NPZ_BYTES_LIMIT = 8 * 1024**3
NPZ_RATIO = 200  # of an array to its compressed bytes; deflate reaches 1032, on nothing but zeros
NPZ_BYTES_FREE = 64 * 1024**2  # as much may unpack from anything
NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes

# Chosen by content, not by name: left open, Pillow hands a PostScript file called `a.png` to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}
# What Pillow, zipfile and numpy raise on damaged bytes. MemoryError is not damage and passes through.
_DAMAGE: _Errors = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError),
)


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
        report: receives one "load" event per image and at most one notice.

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
    frames, total = _open(source, size=size, channels=channels, limit=limit, seed=seed, progress=progress)
    return _assemble(frames, total, size, channels, progress, source, batch)


def _open(
    source: str, *, size: tuple[int, int], channels: int, limit: int, seed: int, progress: Progress
) -> tuple[_Frames, int]:
    """The images of a source as they are stored, and how many there are (at most)."""
    _check_request(size, channels, limit)
    # os.path and not pathlib: a name too long or with a null byte is answered, not raised.
    place = os.path.expanduser(source)
    if os.path.exists(place):
        path = Path(place)
        if path.is_dir():
            files = _list_images(path, progress)
            chosen = _subset(len(files), limit, seed)
            frames, total = _folder_frames([files[i] for i in chosen]), len(chosen)
        elif path.suffix.lower() == ".npz" and path.is_file():
            array = _read_npz(path)
            chosen = _subset(len(array), limit, seed)
            frames, total = _array_frames(path, array, chosen), len(chosen)
        else:
            raise UsageError(
                f"--data {source!r} is neither a folder nor an .npz file; for an image, give its folder"
            )
    elif looks_like_dataset(source):
        frames, total = _dataset_frames(source, limit), limit
    else:
        raise UsageError(f"--data {source!r}: no such folder or .npz file, and not a dataset id (owner/name)")
    return frames, total


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
        for name in (name for name in names if not name.startswith(".")):
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


def _check_request(size: tuple[int, int], channels: int, limit: int) -> None:
    if channels not in _MODES:
        needs = "needs its pipeline's VAE, or images it draws itself (leave out --data)"
        raise UsageError(f"--data: images have 1 or 3 channels; a latent model with {channels} {needs}")
    if min(size) < 1 or limit < 1:
        raise UsageError(f"--data: size {size[0]}x{size[1]} and limit {limit} must be at least 1")


def _subset(count: int, limit: int, seed: int) -> list[int]:
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return [int(i) for i in drawn.sort().values]


def _reason(error: BaseException) -> str:
    """One line on a foreign error, without the query strings of URLs: those of storage hosts are signed."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the object that it read from
        return f"empty, or no {', '.join(_FORMATS)} file"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", lines[0])


@contextmanager
def _decoding(name: str, damage: _Errors = _DAMAGE, remedy: str = "repair or remove it") -> Iterator[None]:
    """Turn what damaged or oversized image bytes raise into one line that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise GfpruneError(f"{name}: over {Image.MAX_IMAGE_PIXELS} pixels; shrink or remove it") from error
    except GfpruneError:
        raise
    except damage as error:
        raise GfpruneError(f"{name}: cannot be read ({_reason(error)}); {remedy}") from error


class _Whole(io.BufferedReader):
    """A file that is never asked for more than it holds: Pillow asks for what a PNG chunk says it is long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 0:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def _folder_frames(files: list[Path]) -> _Frames:
    for file in files:
        name = f"image {str(file)!r}"
        if not file.is_file():  # a broken link, or a pipe that would block for ever
            raise GfpruneError(f"{name}: not a regular file; repair or remove it")
        with (
            _decoding(name),
            _Whole(io.FileIO(file)) as stream,
            Image.open(stream, formats=_FORMATS) as image,
        ):
            image.load()
        yield name, image


def _array_frames(path: Path, array: npt.NDArray[np.uint8], chosen: list[int]) -> _Frames:
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
    except _DAMAGE as error:
        remedy = "write it again with numpy.savez"
        raise GfpruneError(f"{str(path)!r}: not a readable .npz ({_reason(error)}); {remedy}") from error
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


def _dataset_frames(source: str, limit: int) -> _Frames:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        hint = "no such folder or file; for a Hugging Face dataset, pip install gfprune[data]"
        raise UsageError(f"--data {source!r}: {hint}") from error
    check_dataset(source)
    # Builders, HTTP clients and Arrow readers raise types of their own: every Exception is translated.
    try:
        stream = datasets.load_dataset(source, split="train", streaming=True)
    except GfpruneError:  # a signal may arrive in here
        raise
    except Exception as error:
        if (absent := missing_offline(source)) is not None:
            raise absent from error
        what = "no such folder or file, and no Hugging Face dataset with a train split could be opened"
        raise GfpruneError(f"--data {source!r}: {what} ({_reason(error)})") from error
    features = stream.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UsageError(f"--data {source!r}: no image column in it (columns: {', '.join(features)})")
    rows = iter(stream.select_columns([column]).take(limit))
    for index in range(limit):
        name = f"row {index} of dataset {source!r}"
        with _decoding(name, (Exception,), "try again, or download the dataset and give its images"):
            row = next(rows, None)
        if row is None:
            return
        if not isinstance(row[column], Image.Image):
            raise GfpruneError(f"{name}: column {column!r} holds no image")
        yield name, row[column]


def _assemble(
    frames: _Frames,
    total: int,
    size: tuple[int, int],
    channels: int,
    progress: Progress,
    source: str,
    batch: int,
) -> Iterator[torch.Tensor]:
    images: list[npt.NDArray[np.uint8]] = []
    resized: Counter[tuple[int, int]] = Counter()
    count = 0
    for name, frame in frames:
        with _decoding(name):
            image = _flatten(frame, _MODES[channels])
            if image.size != (size[1], size[0]):
                resized[image.size] += 1
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
            pixels = np.asarray(image).reshape(*size, channels)
            images.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        count += 1
        progress(Event("load", count, total, "images"))
        if len(images) == batch:
            yield torch.from_numpy(np.stack(images))
            images = []
    if not count:
        raise UsageError(f"--data {source!r}: no image in this dataset's train split")
    if images:
        yield torch.from_numpy(np.stack(images))
    if resized:
        sizes = [f"{width}x{height}" for (width, height), _ in resized.most_common()]
        sizes[3:] = sizes[3:4] if len(sizes) <= 4 else [f"{len(sizes) - 3} other sizes"]
        what = f"{resized.total()} of {count} images resized to {size[1]}x{size[0]} (width x height)"
        notice(progress, f"{what}, cropped about the centre, from {', '.join(sizes)}")


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Upright, opaque, 8 bits per channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels are floats of unknown range")
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion clips at 255, which turns nearly every image white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
