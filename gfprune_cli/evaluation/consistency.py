"""How close two models' images from the same noise are: SSIM and PSNR, per image."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gfprune_cli.errors import GfpruneError
from gfprune_cli.evaluation.statistics import mean_with_interval

WINDOW = 11
SIGMA = 1.5
TINY = 1e-12


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), 11 x 11 Gaussian window of sigma 1.5, no padding.

    Args:
        first, second: images [N, C, H, W] in [0, 1], at least 11 pixels each way.

    Returns:
        [N] float64, mean over channels; exactly 1 for equal images.

    Raises:
        GfpruneError: shapes differ, or the images are smaller than the window.
    """
    import pytorch_msssim

    if first.shape != second.shape:
        raise GfpruneError(f"SSIM needs equal shapes, not {list(first.shape)} and {list(second.shape)}")
    if min(first.shape[2:]) < WINDOW:
        raise GfpruneError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels")
    found: torch.Tensor = pytorch_msssim.ssim(
        first.double(),
        second.double(),
        data_range=1.0,
        size_average=False,
        win_size=WINDOW,
        win_sigma=SIGMA,
    )
    return found


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[N] peak signal-to-noise ratio in dB of images [N, C, H, W] in [0, 1]; infinite for equal images."""
    error = (first.double() - second.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def quantised(images: torch.Tensor) -> torch.Tensor:
    """What an 8-bit file keeps of images in [0, 1]."""
    return (images.clamp(0, 1) * 255).round() / 255


@dataclass
class Consistency:
    """Scores of pairs of samples, sample by sample."""

    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, first: torch.Tensor, second: torch.Tensor, *, eight_bit: bool) -> None:
        """Compare samples in [0, 1] pair by pair.

        Args:
            first, second: images [N, C, H, W]; videos [N, C, F, H, W] or [N, F, C, H, W], whose frames are
                compared one by one; anything else [N, ...] has no SSIM.
        """
        if first.ndim == 5:
            # SSIM is a mean over channels, each by itself: so is one over the channels of all frames
            first, second = first.flatten(1, 2), second.flatten(1, 2)
        pairs = {"": (first, second)}
        if eight_bit:
            pairs["_8bit"] = (quantised(first), quantised(second))
        for suffix, (one, other) in pairs.items():
            self.extend("psnr" + suffix, psnr(one, other))
            if one.ndim == 4 and min(one.shape[2:]) >= WINDOW:
                self.extend("ssim" + suffix, ssim(one, other))

    def add_relative(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """The norm of the difference of latents [N, ...] over that of the first."""
        one, difference = first.double().flatten(1), (second.double() - first.double()).flatten(1)
        self.extend("relative_error", difference.norm(dim=1) / one.norm(dim=1).clamp_min(TINY))

    def extend(self, name: str, values: torch.Tensor) -> None:
        self.scores.setdefault(name, []).extend(values.tolist())

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metric name -> mean over images with its interval."""
        order = ("ssim", "psnr", "relative_error", "ssim_8bit", "psnr_8bit")
        return {
            name: (mean_psnr if name.startswith("psnr") else mean_with_interval)(self.scores[name])
            for name in order
            if name in self.scores
        }


def mean_psnr(values: Iterable[float]) -> dict[str, Any]:
    """Mean PSNR of the pairs that differ; equal pairs, whose PSNR is infinite, are counted in `identical`.

    The value is None if all pairs are equal: JSON has no infinity.
    """
    array = np.asarray(list(values))
    finite = array[np.isfinite(array)]
    identical = len(array) - len(finite)
    if not len(finite):
        return {"value": None, "ci95": None, "n": len(array), "identical": identical}
    return mean_with_interval(finite) | {"n": len(array), "identical": identical}


def unit_range(images: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Images as shown: [low, high] to [0, 1], clipped."""
    assert low < high, "a range of values"
    return ((images - low) / (high - low)).clamp(0, 1)
