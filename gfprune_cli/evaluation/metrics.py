"""The metrics of an evaluation: a row each; a gate is a field `min_NAME` or `max_NAME` of the recipe."""

from collections.abc import Callable
from dataclasses import dataclass

from gfprune_cli.evaluation.measures import Measures, Values


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        title: how it is written.
        meaning: what it says, and which way is better.
        measure: gives its value under its name, and those of the rows after it that have none of their own;
            nothing where it cannot be measured.
    """

    title: str
    meaning: str
    measure: Callable[[Measures], Values] | None = None


ROUNDED = "the same, on images rounded to 8 bits"
METRICS: dict[str, Metric] = {
    "ssim": Metric(
        "SSIM", "likeness to the reference's image from the same noise; 1 is equal", Measures.consistency
    ),
    "psnr": Metric("PSNR", "likeness to the reference's image from the same noise, in dB; higher is better"),
    "relative_error": Metric(
        "relative error", "distance from the reference's latents over their norm; 0 is equal"
    ),
    "ssim_8bit": Metric("SSIM, 8-bit", ROUNDED),
    "psnr_8bit": Metric("PSNR, 8-bit", ROUNDED),
    "fid": Metric("FID", "Fréchet distance of Inception features; lower is better", Measures.quality),
    "kid": Metric("KID", "kernel distance of Inception features; lower is better"),
    "fd_teacher": Metric(
        "Fréchet distance, teacher",
        "in the reference's own features; lower is better",
        Measures.teacher_distance,
    ),
    "loss": Metric("denoising loss", "mean over all timesteps; lower is better", Measures.loss),
    "loss_reference": Metric("denoising loss, reference", "on the same images and noise"),
}


def all_metrics(measures: Measures) -> Values:
    """Every metric that can be measured, by name."""
    found: Values = {}
    for metric in METRICS.values():
        if metric.measure is not None:
            found |= metric.measure(measures)
    return found
