"""The options of `gfprune analyze`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from gfprune_cli.recipes.options import (
    ConfigFrom,
    Frames,
    GuidanceScale,
    Help,
    ModelOrFile,
    PromptsFile,
    Recipe,
    Size,
)
from gfprune_cli.recipes.prune import BudgetName
from gfprune_cli.recipes.timing import Runtime, Speedup, TimeBatch, Times, TimeSize


@dataclass(frozen=True, kw_only=True)
class AnalyzeRecipe(Recipe):
    """Everything that decides what an analysis shows."""

    model: ModelOrFile = "demo"
    sparsity: Annotated[
        tuple[Annotated[float, Gt(0), Lt(1)], ...], Help("Plan for this sparsity; may be repeated.")
    ] = ()
    budget: Annotated[BudgetName, Help("What the sparsity counts; both: each of them.")] = "both"
    speedup: Annotated[
        tuple[Speedup, ...], Help("Predict the widths that are so many times as fast; may be repeated.")
    ] = ()
    runtime: Runtime = "eager"
    time_batch: TimeBatch = 1
    time_size: TimeSize = None
    times: Times = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None, Help("Of timed passes (default: bf16 on CUDA, else fp32).")
    ] = None
    sensitivity: Annotated[
        bool, Help("Measure how the loss rises as each group shrinks (loads weights).")
    ] = False
    revision: Annotated[str | None, Help("Hub branch, tag or commit.")] = None
    variant: Annotated[str | None, Help("Weights variant to read, such as fp16.")] = None
    config_from: ConfigFrom = None
    component: Annotated[
        str | None,
        Help("Pipeline component to analyze, or all of its denoisers: all (default: the denoiser)."),
    ] = None
    blocks: Annotated[bool, Help("Count whole residual blocks as groups too.")] = False
    prune_width: Annotated[bool, Help("And the residual width of transformers.")] = False
    prompts: PromptsFile = None
    size: Size = None
    frames: Frames = None
    guidance: GuidanceScale = None
