"""The noising process of a checkpoint: noisy inputs, the denoising loss, few-step sampling.

    process = noising_process(scheduler)
    noisy = process.add_noise(images, noise, index)
    losses = process.losses(model(noisy, process.timesteps(index)).sample, images, noise, index)

`index` is the position in the training schedule, 0 (least noise) to `steps - 1`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from gfprune_cli.diffusion.flow_matching import FlowMatching, shifted
from gfprune_cli.diffusion.process import Denoiser, NoisingProcess, mean_part, mean_square, per_sample
from gfprune_cli.diffusion.reconstruction import Reconstruction
from gfprune_cli.diffusion.variance import Limits, VarianceExploding, VariancePreserving
from gfprune_cli.errors import GfpruneError

__all__ = [
    "Denoiser", "FlowMatching", "NoisingProcess", "Reconstruction", "VarianceExploding",
    "VariancePreserving", "mean_part", "mean_square", "noising_process", "per_sample",
]  # fmt: skip

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEVELS = 1000  # of schedules that have none of their own


def noise_level(scheduler: Any, timestep: float) -> float:
    """What the noising process calls a timestep of its scheduler: the same, but for schedules of angles."""
    if type(scheduler).__name__ != "SCMScheduler":
        return timestep
    return math.sin(timestep) / (math.sin(timestep) + math.cos(timestep))


def noising_process(scheduler: Any, mu: float | None = None) -> NoisingProcess:
    """The training process behind a diffusers scheduler.

    Args:
        mu: shift for the size of the images, of schedulers with dynamic shifting; None: that of the
            smallest images in the scheduler's configuration.

    Raises:
        GfpruneError: the scheduler's noise cannot be derived from its configuration.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if name == "ScoreSdeVeScheduler":
        levels = torch.linspace(0, 1, config.num_train_timesteps)
        ratio = config.sigma_max / config.sigma_min
        return VarianceExploding(config.sigma_min * ratio**levels)
    if is_flow(scheduler):
        return flow_matching(config, mu)
    if (own := of_its_own(scheduler)) is not None:
        return own
    prediction = config.get("prediction_type", "epsilon")
    if hasattr(scheduler, "precondition_noise") and prediction in ("epsilon", "v_prediction"):
        return preconditioned(scheduler, prediction, scheduler.precondition_noise)
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is None or prediction not in PREDICTIONS:
        raise GfpruneError(
            f"scheduler {name} (prediction_type {prediction!r}) is not supported: use one with a DDPM, "
            "DDIM, PNDM, DPM-Solver, Euler, FlowMatchEuler, EDM or ScoreSdeVe scheduler"
        )
    signal = torch.as_tensor(signal).float().cpu()
    times = None
    if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        times = 0.25 * ((1 - signal) / signal).sqrt().log()  # as EulerDiscreteScheduler tells its network
    return VariancePreserving(signal, prediction, limits_of(scheduler), times)


def of_its_own(scheduler: Any) -> NoisingProcess | None:
    """Schedules of single families, in terms of the common ones; None for all others."""
    name, levels = type(scheduler).__name__, torch.arange(1, LEVELS + 1) / LEVELS
    if name == "SCMScheduler":  # a flow that is told its noise level (arXiv 2503.09641, section 3.1)
        return FlowMatching(levels, 1.0)
    if name == "CMStochasticIterativeScheduler":  # consistency models (arXiv 2303.01469)
        return preconditioned(scheduler, "epsilon", lambda sigmas: scheduler.sigma_to_t(sigmas.numpy()))
    if hasattr(scheduler, "_alpha_cumprod"):  # continuous time, as of Wuerstchen (arXiv 2306.00637)
        signal = scheduler._alpha_cumprod(levels, "cpu").float()
        return VariancePreserving(signal, "epsilon", Limits(), levels)
    return None


def limits_of(scheduler: Any) -> Limits:
    """How diffusers limits predicted images, for the schedulers that do it in `step`."""
    config = scheduler.config
    if config.get("thresholding") and hasattr(scheduler, "_threshold_sample"):
        return Limits(quantile=config.dynamic_thresholding_ratio, most=config.sample_max_value)
    if config.get("clip_sample") and not type(scheduler).__name__.startswith("CogVideoX"):  # which ignores it
        return Limits(bound=float(config.get("clip_sample_range") or 1.0))
    return Limits()


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler follows straight lines; the multistep solvers do if they are told so."""
    name = type(scheduler).__name__
    return name.startswith(("FlowMatch", "FlowMap")) or bool(scheduler.config.get("use_flow_sigmas"))


def flow_matching(config: Any, mu: float | None) -> FlowMatching:
    """Uniform over the schedule that the scheduler starts from, shifted as it shifts.

    Where sampling stops (`shift_terminal`) and how its steps are spaced are no part of training.
    """
    shift = float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0)
    if config.get("use_dynamic_shifting"):
        mu = float(config.get("base_shift") or 0.5) if mu is None else mu
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    total = config.num_train_timesteps
    levels = total if total > 1 else LEVELS
    sigmas = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    return FlowMatching(shifted(sigmas, shift).float(), float(total), bool(config.get("invert_sigmas")))


def preconditioned(scheduler: Any, prediction: str, told: Callable[..., Any]) -> VariancePreserving:
    """The EDM family (arXiv 2206.00364) as its networks see it: inputs are scaled to unit variance.

    With images divided by sigma_data, c_in (x_0 + sigma noise) is a variance-preserving mixture of signal
    level 1 / (1 + (sigma / sigma_data)^2), and the output is its velocity, or minus that.

    Args:
        told: what the network is told of noise levels [T].
    """
    data = scheduler.config.sigma_data
    sigmas = torch.as_tensor(scheduler.sigmas).double()
    sigmas = sigmas[sigmas > 0].unique()  # ascending
    signal = 1 / (1 + (sigmas / data).square())
    kind = "v_prediction" if prediction == "v_prediction" else "negative_v"
    times = torch.as_tensor(told(sigmas)).float()
    return VariancePreserving(signal.float(), kind, Limits(), times, 1 / data)
