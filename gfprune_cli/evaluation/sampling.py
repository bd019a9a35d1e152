"""Drawing images: DDIM, DDPM, Euler steps, or the pipeline's own scheduler, on any list of timesteps.

Every image has its own noise, initial and per step, so that neither batch size nor the number of processes
decides what is drawn.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.finite import cause, refuse_zero_snr, zero_levels
from gfprune_cli.diffusion.schedulers import (
    Denoiser,
    NoisingProcess,
    Reconstruction,
    VariancePreserving,
    mean_part,
    per_sample,
)
from gfprune_cli.diffusion.variance import Limits
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.protocols import Settings
from gfprune_cli.recipes.evaluate import Spacing
from gfprune_cli.runtime.device import Precision

LEADING = "sample with --timestep-spacing leading"
QUAD_SHARE = 0.8  # of the schedule, as in the DDIM code
Generators = list[torch.Generator]
Sampling = Callable[[Denoiser, torch.Tensor, Generators], torch.Tensor]
UNSEEDED = ("DPMSolverSDEScheduler",)  # draws its noise from a source that takes no generator


def timestep_list(spacing: Spacing, total: int, steps: int, offset: int = 0) -> list[int]:
    """Positions in the schedule, from most to least noise.

    uniform and quad are those of the DDIM code (arXiv 2010.02502, appendix D.3), leading, trailing and
    linspace those of diffusers (arXiv 2305.08891, table 2). quad repeats the first positions when there are
    many steps, as the DDIM code does; such a step changes nothing. Where steps do not divide the schedule,
    uniform spreads them over all of it: the DDIM code then takes more steps than it was asked for.

    Args:
        total: length of the schedule.
        steps: how many positions, at most `total`.
        offset: added to leading positions (`steps_offset` of a scheduler).
    """
    if spacing == "quad":
        found = np.linspace(0, np.sqrt(total * QUAD_SHARE), steps) ** 2
        return [int(value) for value in found[::-1]]
    if spacing == "trailing":
        # as diffusers rounds; for some step counts its range has one position too many, at -1
        found = np.round(np.arange(total, 0, -total / steps))[:steps]
        return [int(value) - 1 for value in found]
    if spacing == "linspace":
        return [int(value) for value in np.linspace(0, total - 1, steps).round()[::-1]]
    if spacing == "uniform":
        return [step * total // steps for step in reversed(range(steps))]
    skip = total // steps
    return [min(total - 1, step * skip + offset) for step in reversed(range(steps))]


def ddim(
    process: VariancePreserving,
    grid: Sequence[int],
    eta: float,
    final: float,
    denoise: Denoiser,
    noise: torch.Tensor,
    generators: Generators,
) -> torch.Tensor:
    """DDIM (arXiv 2010.02502, equations 12 and 16).

    A clipped image leaves the predicted noise as it is, as in diffusers' `DDIMScheduler`.

    Args:
        grid: positions in the schedule, most noise first.
        eta: 0 deterministic, 1 the variance of DDPM.
        final: signal level after the last step, 1 unless the scheduler says otherwise.
    """
    plain, x = replace(process, limits=Limits()), noise
    levels = [*(float(process.signal[now]) for now in grid), final]
    for now, level, following in zip(grid, levels[:-1], levels[1:], strict=True):
        index = torch.full((len(x),), now, device=x.device)
        image, predicted = plain.split(
            denoise(x, process.timesteps(index)), x, per_sample(process.signal, index, x)
        )
        image = process.limits.apply(image)
        variance = eta**2 * (1 - following) / (1 - level) * max(0.0, 1 - level / following)
        direction = max(0.0, 1 - following - variance) ** 0.5
        x = following**0.5 * image + direction * predicted
        if variance:
            x = x + variance**0.5 * step_noise(x, generators)
    return x


def step_noise(like: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Standard normal noise, each image's from its own generator."""
    rows = [torch.randn(like.shape[1:], generator=source) for source in generators]
    return torch.stack(rows).to(like)


def scheduled(scheduler: Any, denoise: Denoiser, noise: torch.Tensor, generators: Generators) -> torch.Tensor:
    """The loop of a diffusers pipeline around a scheduler whose timesteps are set."""
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flows have neither this nor a scaled input
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if seeded else {}
    learned = "learned" in str(scheduler.config.get("variance_type"))  # it takes the variance apart itself
    for timestep in scheduler.timesteps:
        level = timestep.to(x.device).expand(len(x))
        output = denoise(scale(x, timestep), level)
        output = output if learned else mean_part(output, x)
        x = scheduler.step(output, timestep, x, **options).prev_sample
    # the EDM family: networks, and all that is measured, see samples of unit variance
    return x / scheduler.config.sigma_data if hasattr(scheduler, "precondition_noise") else x


def predictor_corrector(
    scheduler: Any, denoise: Denoiser, noise: torch.Tensor, generators: Generators
) -> torch.Tensor:
    """Predictor-corrector sampling (arXiv 2011.13456, algorithm 2) as in diffusers' `ScoreSdeVePipeline`.

    The corrector's step size is a mean over the batch: see `one_at_a_time`.
    """
    x = mean = noise * scheduler.init_noise_sigma
    for position, timestep in enumerate(scheduler.timesteps):
        level = scheduler.sigmas[position].to(x.device).expand(len(x))
        for _ in range(scheduler.config.correct_steps):
            x = scheduler.step_correct(denoise(x, level), x, generator=generators).prev_sample
        found = scheduler.step_pred(denoise(x, level), timestep, x, generator=generators)
        x, mean = found.prev_sample, found.prev_sample_mean
    return mean


def one_at_a_time(settings: Settings, scheduler: Any) -> bool:
    """Whether images of one batch would depend on each other."""
    return settings.sampler == "pipeline" and hasattr(scheduler, "step_pred")


def make_sampling(
    settings: Settings, process: NoisingProcess, scheduler: Any, mu: float | None = None
) -> Sampling:
    """The sampler that the settings ask for; autoencoders give back what they are given.

    Args:
        mu: shift for the size of the samples, of schedulers with dynamic shifting.

    Raises:
        UsageError: the pipeline's scheduler cannot do it; GfpruneError: it starts where no image can be told.
    """
    spacing, steps = settings.timestep_spacing, settings.steps
    if settings.sampler == "euler" or isinstance(process, Reconstruction):
        return lambda denoise, noise, generators: process.sample(denoise, noise, steps)
    if settings.sampler == "pipeline":
        starts = own_scheduler(scheduler, settings, mu).timesteps
        if {int(level) for level in starts} & set(zero_levels(process)):
            refuse_zero_snr(process, LEADING)
        loop = predictor_corrector if hasattr(scheduler, "step_pred") else scheduled
        return lambda denoise, noise, generators: loop(
            own_scheduler(scheduler, settings, mu), denoise, noise, generators
        )
    assert spacing is not None
    assert isinstance(process, VariancePreserving)
    grid = timestep_list(spacing, process.steps, steps, scheduler.config.get("steps_offset", 0))
    if set(grid) & set(zero_levels(process)):
        refuse_zero_snr(process, LEADING)
    if settings.sampler == "ddpm":
        return lambda denoise, noise, generators: scheduled(
            ddpm_scheduler(scheduler, grid), denoise, noise, generators
        )
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return lambda denoise, noise, generators: ddim(
        process, grid, settings.eta, final, denoise, noise, generators
    )


def ddpm_scheduler(scheduler: Any, grid: Sequence[int]) -> Any:
    """diffusers' ancestral sampler (arXiv 2006.11239, algorithm 2) on these positions, repeats left out."""
    import diffusers

    made = diffusers.DDPMScheduler.from_config(scheduler.config)
    made.set_timesteps(timesteps=list(dict.fromkeys(grid)))
    return made


def own_scheduler(scheduler: Any, settings: Settings, mu: float | None = None) -> Any:
    """A copy of the pipeline's scheduler with its timesteps set; its state belongs to one batch.

    Raises:
        UsageError: it cannot be seeded, or does not know this spacing.
    """
    name, spacing = type(scheduler).__name__, settings.timestep_spacing
    if name in UNSEEDED:
        raise UsageError(f"--sampler pipeline: {name} cannot be seeded per image; use --sampler ddim")
    step = getattr(scheduler, "step", None)
    if step is not None and "old_pred_original_sample" in inspect.signature(step).parameters:
        raise UsageError(f"--sampler pipeline: only its own pipeline can step {name}; use --sampler ddim")
    made = copy.deepcopy(scheduler)
    if spacing in ("leading", "trailing", "linspace") and "timestep_spacing" in scheduler.config:
        made = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
    elif spacing is not None:
        raise UsageError(f"--timestep-spacing {spacing}: {name} does not know it; use --sampler ddim or ddpm")
    if scheduler.config.get("use_dynamic_shifting") and mu is not None:
        # the steps of the pipelines whose shift depends on the size: the last one ends at no noise
        made.set_timesteps(sigmas=np.linspace(1, 1 / settings.steps, settings.steps).tolist(), mu=mu)
    else:
        made.set_timesteps(settings.steps)
    if hasattr(made, "set_sigmas"):
        made.set_sigmas(settings.steps)
    return made


def draw(
    sampling: Sampling,
    denoise: Denoiser,
    *,
    members: Sequence[int],
    shape: tuple[int, ...],
    seed: int,
    device: torch.device,
    what: str,
    given: torch.Tensor | None = None,
    precision: Precision = "fp32",
) -> torch.Tensor:
    """[N, *shape] samples number `members`, on the CPU, in the network's range.

    Args:
        given: [N, *shape] what to start from, in the place of noise.
        precision: of the passes, for the message.

    Raises:
        GfpruneError: a sample is not finite; says where that began.
    """
    # not the noise of calibration images: a model must not be judged on what it was distilled on
    noise = given
    if noise is None:
        noise = torch.stack([torch.randn(shape, generator=generator(seed, "evaluate", i)) for i in members])

    def fresh() -> Generators:
        return [generator(seed, "evaluate", "steps", i) for i in members]

    with torch.no_grad():
        images = sampling(denoise, noise.to(device), fresh()).float().cpu()
    if not bool(images.isfinite().all()):
        with torch.no_grad():
            why = cause(lambda watched: sampling(watched, noise.to(device), fresh()), denoise)
        narrow = "" if precision == "fp32" else "; or use --precision fp32"
        raise GfpruneError(f"samples of {what} are not finite: {why}{narrow}")
    return images
