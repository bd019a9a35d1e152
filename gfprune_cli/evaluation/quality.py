"""FID and KID against real images, or against statistics of real images that an earlier run saved."""

import io
import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfprune_cli.data.decoding import DAMAGE, reason_of
from gfprune_cli.data.images import image_batches
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.inception import Extractor
from gfprune_cli.evaluation.statistics import (
    Features,
    Gaussian,
    frechet_distance,
    gaussian,
    kernel_distance,
)
from gfprune_cli.progress import Event, Progress

REAL_IMAGES = 10**6  # no more than these are read from --data
REAL_BATCH = 64
LARGEST_STATISTICS = 1 << 30  # bytes
LARGEST_NOTE = 4096  # bytes of a name or number beside the statistics
SLACK = 1e-5  # of a covariance: how far rounding may carry it from symmetric and positive


@dataclass(frozen=True)
class Real:
    """What samples are compared with: a Gaussian, and the features themselves if there are images."""

    gaussian: Gaussian
    features: Features | None


def is_statistics(data: str | None) -> bool:
    """Whether `--data` names an .npz of statistics, not images.

    Raises:
        GfpruneError: the .npz is damaged.
    """
    path = os.path.expanduser(data or "")
    if not path.lower().endswith(".npz") or not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except DAMAGE as error:
        raise GfpruneError(
            f"--data {path}: not a readable .npz ({reason_of(error)}); write it again"
        ) from error


def read_statistics(path: Path, extractor: Extractor) -> tuple[Gaussian, list[str]]:
    """Mean and covariance of real images' features, and what the user should know about them.

    The file may be anything: sizes are checked before they are allocated, and what it says it is made of
    before it is read.

    Raises:
        GfpruneError: the file is damaged; UsageError: it is of another extractor or mode.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {key: array_shape(archive, key) for key in ("mu", "sigma")}
            size, *rest = shapes["mu"] or (0,)
            if rest or size < 1 or shapes["sigma"] != (size, size):
                raise ValueError(f"mu is {list(shapes['mu'])} and sigma {list(shapes['sigma'])}")
            stored = archive.namelist()
            given = [key for key in ("extractor", "mode") if f"{key}.npy" in stored]
            made = {key: str(note(archive, key, "U")) for key in given}
            count = image_count(note(archive, "n", "iuf")) if "n.npy" in stored else None
            warnings = check_origin(path, made, size, extractor)
            mean, covariance = (read_array(archive, key) for key in ("mu", "sigma"))
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("they are not finite")
        if not is_covariance(covariance):
            raise ValueError("sigma is no covariance")
    except DAMAGE as error:
        reason = reason_of(error)
        raise GfpruneError(f"--data {path}: not readable statistics ({reason}); write them again") from error
    return Gaussian(mean, covariance, count), warnings


def read_array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, which are those of the bytes stored.

    Raises:
        ValueError: it is not plain, or too large.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        # later versions are for headers over 64 kB
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} is not a plain array")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
        if dtype.hasobject or stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{name} does not hold the numbers that it announces")
    if member.file_size > LARGEST_STATISTICS:
        raise ValueError(f"{name} is larger than {LARGEST_STATISTICS} bytes")
    return shape, dtype


def array_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array of floating-point numbers.

    Raises:
        ValueError: it holds something else.
    """
    shape, dtype = read_array_header(archive, name)
    if dtype.kind != "f" or dtype.itemsize not in (4, 8):
        raise ValueError(f"{name} holds {dtype}, not float32 or float64")
    return shape


def read_array(archive: zipfile.ZipFile, name: str) -> Features:
    """An array whose header has been checked, as float64."""
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False), np.float64)


def note(archive: zipfile.ZipFile, name: str, kinds: str) -> Any:
    """A single value of one of numpy's `kinds`.

    Raises:
        ValueError: it is something else.
    """
    shape, dtype = read_array_header(archive, name)
    if shape or dtype.kind not in kinds or dtype.itemsize > LARGEST_NOTE:
        raise ValueError(f"{name} is {list(shape)} of {dtype}, not a single value")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False).item()


def image_count(stored: float) -> int:
    """How many images statistics are of.

    Raises:
        ValueError: no statistics can be of so many.
    """
    if not math.isfinite(stored) or stored < 2 or stored != int(stored):
        raise ValueError(f"n is {stored}, not a number of images of at least 2")
    return int(stored)


def is_covariance(matrix: Features) -> bool:
    """Whether a finite matrix [D, D] is symmetric with no negative eigenvalue, up to rounding."""
    scale = float(np.abs(matrix).max())
    if scale == 0:
        return True
    matrix = matrix / scale  # nothing below overflows
    if np.abs(matrix - matrix.T).max() > SLACK or matrix.diagonal().min() < 0:
        return False
    return bool(np.linalg.eigvalsh(matrix).min() >= -SLACK * np.trace(matrix))


def check_origin(path: Path, made: dict[str, str], size: int, extractor: Extractor) -> list[str]:
    """Refuse statistics of another extractor or mode; warnings where they do not tell.

    Raises:
        UsageError: they are of another one.
    """
    wanted = {"extractor": extractor.identity, "mode": extractor.mode}
    for key, value in made.items():
        if value != wanted[key]:
            raise UsageError(f"--data {path} was made with {key} {value!r}, not {wanted[key]!r}")
    if size != extractor.dimensions:
        raise UsageError(
            f"--data {path}: statistics of {size} dimensions, but {extractor.identity} gives "
            f"{extractor.dimensions}; name those of this extractor"
        )
    unknown = [key for key in wanted if key not in made]
    if not unknown:
        return []
    return [
        f"{path} does not name its {' and '.join(unknown)}: taken to be {extractor.identity} "
        f"in mode {extractor.mode}"
    ]


def statistics_bytes(found: Gaussian, extractor: Extractor) -> bytes:
    """An .npz with mu, sigma, n, extractor and mode."""
    stream = io.BytesIO()
    count: dict[str, Any] = {} if found.count is None else {"n": np.int64(found.count)}
    np.savez(
        stream,
        mu=found.mean,
        sigma=found.covariance,
        **count,
        extractor=np.str_(extractor.identity),
        mode=np.str_(extractor.mode),
    )
    return stream.getvalue()


def real_features(
    data: str, extractor: Extractor, *, size: tuple[int, int], channels: int, progress: Progress
) -> Real:
    """Features of the images of `--data`, in the network's size.

    Raises:
        UsageError: too few images; GfpruneError: an image cannot be read.
    """
    batches = image_batches(
        data, size=size, channels=channels, limit=REAL_IMAGES, batch=REAL_BATCH, progress=progress
    )
    features = np.concatenate([extractor.features(images) for images in batches])
    if len(features) < 2:
        raise UsageError(f"--data {data} holds {len(features)} image: at least 2 are needed")
    return Real(gaussian(features), features)


def sample_features(
    chunks: Iterable[torch.Tensor], extractor: Extractor, total: int, progress: Progress
) -> Features:
    """[N, D] features of samples [n, C, H, W] in [0, 1], as 8-bit images."""
    found = []
    done = 0
    for images in chunks:
        found.append(extractor.features((images * 255).round().to(torch.uint8)))
        done += len(images)
        progress(Event("inception", done, total))
    return np.concatenate(found)


def distances(features: Features, real: Real, extractor: Extractor, seed: int) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance of samples to real images, under the names that the extractor allows.

    Raises:
        GfpruneError: a distance is not finite.
    """
    samples = gaussian(features)
    origin = {"extractor": extractor.identity, "mode": extractor.mode, "n_real": real.gaussian.count}
    distance = frechet_distance(real.gaussian, samples)
    found = {extractor.fid: {"value": distance, "ci95": None, "n": len(features)} | origin}
    if real.features is not None:
        kernel = kernel_distance(real.features, features, seed)
        if not math.isfinite(kernel["value"]):
            raise GfpruneError(f"{extractor.kid} is not finite: check the model and --data")
        found[extractor.kid] = kernel | origin
    return found
