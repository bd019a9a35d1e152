"""FID and KID against real images, or against statistics of real images that an earlier run saved."""

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from gfprune_cli.progress import Event, Report

REAL_IMAGES = 10**6  # no more than these are read from --data
REAL_BATCH = 64
LARGEST_STATISTICS = 1 << 30  # bytes
SLACK = 1e-5  # of a covariance: how far rounding may carry it from symmetric and positive
# what numpy and zipfile raise on damaged bytes
DAMAGE = (
    *(OSError, ValueError, TypeError, KeyError, ArithmeticError, EOFError, SyntaxError, NotImplementedError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, np.linalg.LinAlgError),
)


@dataclass(frozen=True)
class Real:
    """What samples are compared with: a Gaussian, and the features themselves if there are images."""

    gaussian: Gaussian
    features: Features | None


def is_statistics(data: str | None) -> bool:
    """Whether `--data` names an .npz of statistics, not images."""
    path = Path(data or "").expanduser()
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except DAMAGE as error:
        raise GfpruneError(f"--data {path}: not a readable .npz ({error}); write it again") from error


def check_array(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse anything but floating-point numbers, as many as the file holds, before they are allocated.

    Raises:
        ValueError: what is wrong.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} is not a plain array")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
        if dtype.kind != "f" or stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{name} does not hold the floating-point numbers it announces")


def read_statistics(path: Path, extractor: Extractor) -> tuple[Gaussian, list[str]]:
    """Mean and covariance of real images' features, and what the user should know about them.

    Raises:
        GfpruneError: the file is damaged; UsageError: it is of another extractor or mode.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_STATISTICS:
                raise GfpruneError(f"--data {path}: larger than {LARGEST_STATISTICS} bytes")
            for name in ("mu", "sigma"):
                check_array(archive, name)
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (np.asarray(archive[key], np.float64) for key in ("mu", "sigma"))
            made = {key: str(archive[key]) for key in ("extractor", "mode") if key in archive}
            count = int(archive["n"]) if "n" in archive else None
    except DAMAGE as error:
        raise GfpruneError(f"--data {path}: not readable statistics ({error}); write them again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise GfpruneError(
            f"--data {path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; write them again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise GfpruneError(f"--data {path}: statistics are not finite; write them again")
    scale = max(float(np.abs(covariance).max()), 1e-12)
    lowest = float(np.linalg.eigvalsh(covariance).min())
    if np.abs(covariance - covariance.T).max() > SLACK * scale or lowest < -SLACK * len(mean) * scale:
        raise GfpruneError(f"--data {path}: sigma is no covariance; write the statistics again")
    wanted = {"extractor": extractor.identity, "mode": extractor.mode}
    for key, value in made.items():
        if value != wanted[key]:
            raise UsageError(f"--data {path} was made with {key} {value!r}, not {wanted[key]!r}")
    unknown = [key for key in wanted if key not in made]
    warnings = [
        f"{path} does not name its {' and '.join(unknown)}: taken to be {extractor.identity} "
        f"in mode {extractor.mode}"
    ]
    return Gaussian(mean, covariance, count), warnings if unknown else []


def statistics_bytes(found: Gaussian, extractor: Extractor) -> bytes:
    """An .npz with mu, sigma, n, extractor and mode."""
    stream = io.BytesIO()
    np.savez(
        stream,
        mu=found.mean,
        sigma=found.covariance,
        n=np.int64(found.count or 0),
        extractor=np.str_(extractor.identity),
        mode=np.str_(extractor.mode),
    )
    return stream.getvalue()


def real_features(
    data: str, extractor: Extractor, *, size: tuple[int, int], channels: int, report: Report
) -> Real:
    """Features of the images of `--data`, in the network's size.

    Raises:
        UsageError: too few images; GfpruneError: an image cannot be read.
    """
    batches = image_batches(
        data, size=size, channels=channels, limit=REAL_IMAGES, batch=REAL_BATCH, report=report
    )
    features = np.concatenate([extractor.features(images) for images in batches])
    if len(features) < 2:
        raise UsageError(f"--data {data} holds {len(features)} image: at least 2 are needed")
    return Real(gaussian(features), features)


def sample_features(
    chunks: Iterable[torch.Tensor], extractor: Extractor, total: int, report: Report
) -> Features:
    """[N, D] features of samples [n, C, H, W] in [0, 1], as 8-bit images."""
    found = []
    done = 0
    for images in chunks:
        found.append(extractor.features((images * 255).round().to(torch.uint8)))
        done += len(images)
        report(Event("inception", done, total))
    return np.concatenate(found)


def distances(features: Features, real: Real, extractor: Extractor, seed: int) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance of samples to real images, under the names that the extractor allows.

    Raises:
        UsageError: the statistics have another number of dimensions.
    """
    samples = gaussian(features)
    if samples.mean.shape != real.gaussian.mean.shape:
        raise UsageError(
            f"--data: statistics of {len(real.gaussian.mean)} dimensions, but {extractor.identity} "
            f"gives {len(samples.mean)}"
        )
    origin = {"extractor": extractor.identity, "mode": extractor.mode, "n_real": real.gaussian.count}
    distance = frechet_distance(real.gaussian, samples)
    if not math.isfinite(distance):
        raise GfpruneError(f"the distance in the features of {extractor.identity} is not finite")
    found = {extractor.fid: {"value": distance, "ci95": None, "n": len(features)} | origin}
    if real.features is not None:
        found[extractor.kid] = kernel_distance(real.features, features, seed) | origin
    return found
