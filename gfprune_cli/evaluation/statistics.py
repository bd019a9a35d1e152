"""Means with confidence intervals, and distances between distributions of features."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gfprune_cli.errors import GfpruneError

NORMAL_95 = 1.959963984540054
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
Features = npt.NDArray[np.float64]


def mean_with_interval(values: npt.ArrayLike) -> dict[str, Any]:
    """Mean of independent values and its 95 % confidence interval by the normal approximation."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return {"value": mean, "ci95": None, "n": len(array)}
    half = NORMAL_95 * float(array.std(ddof=1)) / len(array) ** 0.5
    return {"value": mean, "ci95": [mean - half, mean + half], "n": len(array)}


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of `count` feature vectors (None if unknown)."""

    mean: Features
    covariance: Features
    count: int | None


def gaussian(features: npt.ArrayLike) -> Gaussian:
    """The Gaussian that is fitted to features [N, D]."""
    array = np.asarray(features, dtype=np.float64)
    return Gaussian(array.mean(0), np.atleast_2d(np.cov(array, rowvar=False)), len(array))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; arXiv 1706.08500, equation 6).

    The trace of sqrt(A B) is the sum of the square roots of the eigenvalues of sqrt(A) B sqrt(A), which is
    symmetric: exact where the covariances are singular, as they are with few samples.

    Raises:
        GfpruneError: the features are not finite, or too large to be compared.
    """
    try:
        with np.errstate(all="ignore"):  # what overflows is refused below
            values, vectors = np.linalg.eigh(first.covariance)
            root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
            product = np.linalg.eigvalsh(root @ second.covariance @ root)
            difference = first.mean - second.mean
            distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance)
            found = float(distance - 2 * np.sqrt(product.clip(0)).sum())
    except np.linalg.LinAlgError as error:
        raise GfpruneError(f"features cannot be compared ({error}): check the model and --data") from error
    if not math.isfinite(found):  # before clipping: the larger of 0 and NaN would be a perfect score
        raise GfpruneError("features cannot be compared (not finite): check the model and --data")
    return max(0.0, found)


def kernel_distance(first: Features, second: Features, seed: int) -> dict[str, Any]:
    """KID (arXiv 1801.01401): squared MMD with the kernel (x.y / D + 1)^3, unbiased, over random subsets.

    The estimator and its settings are clean-fid's, whose subsets are unseeded; these come from `seed`.

    Args:
        first, second: features [N, D] and [M, D].

    Returns:
        The mean over subsets, and their standard deviation (subsets overlap: it is no error of the mean).
    """
    source = np.random.default_rng(seed)
    size = min(len(first), len(second), KID_SUBSET_SIZE)
    values = []
    for _ in range(KID_SUBSETS):
        x = first[source.choice(len(first), size, replace=False)]
        y = second[source.choice(len(second), size, replace=False)]
        values.append(squared_mmd(x, y))
    spread = float(np.std(values))
    return {"value": float(np.mean(values)), "ci95": None, "n": len(second), "subset_std": spread}


def squared_mmd(x: Features, y: Features) -> float:
    """Unbiased squared maximum mean discrepancy of equally many features [N, D] under the cubic kernel."""
    size, dimensions = x.shape
    within = (x @ x.T / dimensions + 1) ** 3 + (y @ y.T / dimensions + 1) ** 3
    between = (x @ y.T / dimensions + 1) ** 3
    off_diagonal = within.sum() - np.trace(within)
    return float(off_diagonal / (size * (size - 1)) - 2 * between.mean())
