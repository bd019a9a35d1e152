"""What to say of values that are not finite: at which timestep they begin, and of what.

Nothing is looked at while all is well, as every look at a number waits for the device; what failed is run
once more.
"""

from collections.abc import Callable

import torch

from gfprune_cli.diffusion.guidance import GuidedProcess
from gfprune_cli.diffusion.process import Denoiser, NoisingProcess
from gfprune_cli.diffusion.variance import VariancePreserving
from gfprune_cli.errors import GfpruneError

ZERO_SNR = (
    "the scheduler's betas are rescaled to zero terminal SNR (rescale_betas_zero_snr), and from pure noise "
    "an epsilon prediction gives no image"
)
SCHEDULER = "rescale_betas_zero_snr or prediction_type in scheduler_config.json"
NETWORK = "check the checkpoint, and that its scheduler is the one it was trained with"
NAMED = 4  # timesteps in a message


class NotFinite(GfpruneError):
    """Numbers that are not finite, without their cause yet."""


class Found(Exception):
    """Where they begin."""


def zero_levels(process: NoisingProcess) -> list[int]:
    """Positions in the schedule from which a predicted noise gives no image: there is none in the input.

    Where a scheduler clips predicted images to finite bounds it gives one all the same.
    """
    plain = process.process if isinstance(process, GuidedProcess) else process
    if not isinstance(plain, VariancePreserving) or plain.prediction != "epsilon":
        return []
    clipped = plain.limits.bound < float("inf") and not plain.limits.quantile
    return [] if clipped else torch.nonzero(plain.signal == 0).flatten().tolist()


def refuse_zero_snr(process: NoisingProcess, remedy: str) -> None:
    """Refuse to draw images from pure noise by its prediction.

    Raises:
        GfpruneError: the schedule ends without signal, and the network predicts the noise.
    """
    if process.steps - 1 in zero_levels(process):
        raise GfpruneError(f"{ZERO_SNR}: {remedy}, or correct {SCHEDULER}")


def timestep_names(timesteps: torch.Tensor) -> str:
    """Some different timesteps, least first, as a message names them."""
    found = [f"{value:g}" for value in sorted(set(timesteps.double().flatten().tolist()))]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"timestep{'s' * (len(found) > 1)} {', '.join(found[:NAMED])}{more}"


def lost_at(what: str, bad: torch.Tensor, timesteps: torch.Tensor, otherwise: str) -> GfpruneError:
    """The error for some of N samples.

    Args:
        what: is not finite.
        bad: [N] bool, timesteps: [N].
        otherwise: what to do where all of them are bad, so that no timestep is to blame.
    """
    bad, timesteps = bad.cpu(), timesteps.cpu()
    if bool(bad.all()):
        return GfpruneError(f"{what} is not finite at any of {len(bad)} noise levels: {otherwise}")
    return GfpruneError(
        f"{what} is not finite at {timestep_names(timesteps[bad])}, and finite at the other"
        f" {int((~bad).sum())} noise levels tried: {NETWORK}"
    )


class Watched:
    """A denoiser that stops at the first value that is not finite."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise, self.last = denoise, ""

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if not bool(x.isfinite().all()):
            raise Found(self.step())
        output = self.denoise(x, timesteps)
        self.last = timestep_names(timesteps)
        if not bool(output.isfinite().all()):
            raise Found(f"the network's output at {self.last} is not finite: {NETWORK}")
        return output

    def step(self) -> str:
        """What is to blame where every output was finite."""
        return (
            f"the network's output at {self.last} is finite and the sampler's step from it is not: check the "
            "scheduler's settings"
        )


def cause(again: Callable[[Denoiser], torch.Tensor], denoise: Denoiser) -> str:
    """Why samples are not finite.

    Args:
        again: draws the same samples by a denoiser.
    """
    watched = Watched(denoise)
    try:
        again(watched)
    except Found as found:
        return str(found)
    return watched.step()
