"""The options of `gfprune eval`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from gfprune_cli.recipes.options import Frames, GuidanceScale, Help, PromptsFile, Recipe, Size, refuse_idle

Sampler = Literal["ddim", "ddpm", "euler", "pipeline"]
Spacing = Literal["quad", "uniform", "leading", "trailing", "linspace"]
FidMode = Literal["clean", "legacy_pytorch"]
ProtocolName = Literal["ddpm-cifar10", "celeba64", "lsun-church", "lsun-bedroom"]


@dataclass(frozen=True, kw_only=True)
class EvalRecipe(Recipe):
    """Everything that decides the numbers of an evaluation.

    What is None here is set by the protocol, or else by `evaluation.protocols`.
    """

    model: Annotated[str, Help("demo, a local diffusers folder, or a Hub id owner/name.")] = "demo"
    revision: Annotated[str | None, Help("Hub branch, tag or commit of the model.")] = None
    variant: Annotated[str | None, Help("Weights variant to read, such as fp16.")] = None
    component: Annotated[str | None, Help("Pipeline component to evaluate (default: the denoiser).")] = None
    reference: Annotated[
        str | None, Help("Dense model to compare with (default: the one in the model's gfprune.json).")
    ] = None
    reference_revision: Annotated[str | None, Help("Hub branch, tag or commit of the reference.")] = None
    reference_variant: Annotated[str | None, Help("Weights variant of the reference.")] = None
    data: Annotated[
        str | None, Help("Real images: folder, .npz or dataset id; or an .npz of --save-stats.")
    ] = None
    protocol: Annotated[
        ProtocolName | None, Help("Sample as a published protocol does; flags override it.")
    ] = None
    samples: Annotated[
        int | None, Ge(2), Le(10**7), Help("Images to draw from each model [default: 256].")
    ] = None
    steps: Annotated[int | None, Ge(1), Le(10**6), Help("Sampling steps [default: 50].")] = None
    sampler: Annotated[
        Sampler | None,
        Help("pipeline: the checkpoint's own scheduler [default: ddim; euler if variance exploding]."),
    ] = None
    timestep_spacing: Annotated[
        Spacing | None, Help("Which timesteps [default: trailing; with pipeline its scheduler's].")
    ] = None
    eta: Annotated[
        float | None, Ge(0), Le(1), Help("Noise of DDIM steps, 0 for none and 1 for DDPM's [default: 0].")
    ] = None
    batch: Annotated[int, Ge(1), Le(65536), Help("Images drawn at a time.")] = 32
    precision: Annotated[Literal["fp32", "bf16", "fp16"], Help("Of network passes.")] = "fp32"
    inception: Annotated[
        str | None, Help("Inception weights for FID and KID (default: fetched once, SHA-256 checked).")
    ] = None
    inception_sha256: Annotated[
        str | None, Help("SHA-256 of --inception, for a file that gfprune does not know.")
    ] = None
    fid_mode: Annotated[FidMode | None, Help("Resizing and network of clean-fid [default: clean].")] = None
    no_latency: Annotated[bool, Help("Do not measure latency and memory.")] = False
    latency_batches: Annotated[str, Help("Batch sizes to time, separated by commas.")] = "1,64"
    compile: Annotated[bool, Help("Time torch.compile as well.")] = False
    deepcache: Annotated[bool, Help("Time the model with DeepCache-style caching as well.")] = False
    max_fid: Annotated[float | None, Ge(0), Help("Exit with 3 if the FID is above this.")] = None
    min_ssim: Annotated[
        float | None, Ge(-1), Le(1), Help("Exit with 3 if the SSIM to the reference is below this.")
    ] = None
    min_speedup: Annotated[
        float | None, Gt(0), Help("Exit with 3 if the eager speed-up at the largest batch is below this.")
    ] = None
    max_loss: Annotated[float | None, Gt(0), Help("Exit with 3 if the denoising loss is above this.")] = None
    prompts: PromptsFile = None
    size: Size = None
    frames: Frames = None
    guidance: GuidanceScale = None
    seed: Annotated[int, Ge(0), Lt(2**63), Help("Of every random number in the run.")] = 0

    def __post_init__(self) -> None:
        if self.no_latency:
            refuse_idle(self, "--no-latency", "compile", "deepcache", "latency_batches")
