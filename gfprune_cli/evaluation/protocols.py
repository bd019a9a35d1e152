"""How samples are drawn: the defaults, and the protocols that published numbers were measured with."""

from dataclasses import dataclass

from gfprune_cli.diffusion.schedulers import (
    NoisingProcess,
    Reconstruction,
    VarianceExploding,
    VariancePreserving,
)
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.evaluate import EvalRecipe, FidMode, Sampler, Spacing


@dataclass(frozen=True)
class Settings:
    """How the samples of one run are drawn and judged; `timestep_spacing` None leaves it to a scheduler."""

    samples: int
    steps: int
    sampler: Sampler
    timestep_spacing: Spacing | None
    eta: float
    fid_mode: FidMode


def diff_pruning_protocol(spacing: Spacing) -> Settings:
    """Fang et al., "Structural Pruning for Diffusion Models" (arXiv 2305.10924), section 4 and its code."""
    return Settings(50_000, 100, "ddim", spacing, 0.0, "legacy_pytorch")


PROTOCOLS = {
    "ddpm-cifar10": diff_pruning_protocol("quad"),
    "celeba64": diff_pruning_protocol("uniform"),
    "lsun-church": diff_pruning_protocol("uniform"),
    "lsun-bedroom": diff_pruning_protocol("uniform"),
}


def settings_of(recipe: EvalRecipe, process: NoisingProcess) -> Settings:
    """Flags, then the protocol, then the defaults.

    Raises:
        UsageError: a sampler that the noising process has no steps for, or an option that it ignores.
    """
    usual = Settings(256, 50, usual_sampler(process), "trailing", 0.0, "clean")
    base = PROTOCOLS[recipe.protocol] if recipe.protocol else usual
    sampler = recipe.sampler or base.sampler
    check_sampler(sampler, process)
    spacing = recipe.timestep_spacing
    if sampler in ("ddim", "ddpm"):
        spacing = spacing or base.timestep_spacing
    if sampler == "euler" and spacing is not None:
        raise UsageError("--timestep-spacing: euler steps are equally spaced in log sigma: drop the flag")
    if recipe.eta and sampler != "ddim":
        raise UsageError(f"--eta is for --sampler ddim, not for {sampler}: drop one of the two")
    eta = base.eta if recipe.eta is None else recipe.eta
    steps = recipe.steps or base.steps
    if steps > process.steps and not isinstance(process, Reconstruction):
        raise UsageError(f"--steps {steps}: the noise schedule has {process.steps} steps; ask for fewer")
    return Settings(
        recipe.samples or base.samples,
        steps,
        sampler,
        spacing,
        eta if sampler == "ddim" else 0.0,
        recipe.fid_mode or base.fid_mode,
    )


def usual_sampler(process: NoisingProcess) -> Sampler:
    """DDIM where it has steps; else Euler for score models, and the scheduler's own steps for flows."""
    if isinstance(process, VariancePreserving):
        return "ddim"
    return "euler" if isinstance(process, VarianceExploding) else "pipeline"


def check_sampler(sampler: Sampler, process: NoisingProcess) -> None:
    usual = usual_sampler(process)
    if isinstance(process, Reconstruction) and sampler != "pipeline":
        raise UsageError(f"--sampler {sampler}: autoencoders give images back in one pass: drop the flag")
    if usual == "pipeline" and sampler != "pipeline":
        raise UsageError(
            f"--sampler {sampler} has no steps along the straight lines of this model's noise: use pipeline"
        )
    if usual == "euler" and sampler in ("ddim", "ddpm"):
        raise UsageError(
            f"--sampler {sampler} is for variance-preserving noise, and this model's explodes: "
            "use euler or pipeline"
        )
    if sampler == "euler" and usual != "euler":
        raise UsageError("--sampler euler is for variance-exploding models: use ddim, ddpm or pipeline")
