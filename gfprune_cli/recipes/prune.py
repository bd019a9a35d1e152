"""The options of `gfprune prune`."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.options import (
    ALL,
    ConfigFrom,
    Frames,
    GuidanceScale,
    Help,
    ModelOrFile,
    Names,
    PromptsFile,
    Recipe,
    Size,
    refuse_idle,
)
from gfprune_cli.recipes.timing import (
    Latency,
    Runtime,
    Speedup,
    TimeBatch,
    Times,
    TimeSize,
    check_time_options,
)

MOST = 0.95  # the sparsity at which a run ends that only its loss limits
CRITERIA = ("gradient-flow", "gradient-flow-abs", "taylor", "fisher", "diff-pruning", "magnitude", "random")
CriterionName = Annotated[str, Names(CRITERIA, "gfprune_cli.flow.criteria:CRITERIA")]
Share = Annotated[float, Ge(0), Lt(1)]
BudgetName = Annotated[str, Names(("both", "params", "macs"), "gfprune_cli.structure.cost:COSTS")]


@dataclass(frozen=True, kw_only=True)
class PruneRecipe(Recipe):
    """Everything that decides the bytes of a prune run's output."""

    model: ModelOrFile = "demo"
    revision: Annotated[str | None, Help("Hub branch, tag or commit.")] = None
    variant: Annotated[str | None, Help("Weights variant to read, such as fp16.")] = None
    config_from: ConfigFrom = None
    component: Annotated[
        str | None, Help("Pipeline component to prune, or all of its denoisers: all (default: the denoiser).")
    ] = None
    sparsity: Annotated[
        Share | tuple[Share, ...] | None,
        Help(
            "Fraction of the budget to remove, below 1; 0 only folds (--fold). Repeated: one network for "
            "each, all of one flow (default: 0.5; none with --speedup, --latency, --keep-loss)."
        ),
    ] = None
    keep_loss: Annotated[
        float | None,
        Gt(1),
        Le(100),
        Help("Prune until the held-out loss, after the refit, is this many times that of the dense network."),
    ] = None
    budget: Annotated[BudgetName, Help("What the sparsity counts; both: each of them.")] = "both"
    speedup: Annotated[
        Speedup | None, Help("How many times as fast the network is to be, measured in --runtime.")
    ] = None
    latency: Annotated[
        Latency | None, Help("Or: milliseconds that one evaluation may take in --runtime.")
    ] = None
    runtime: Runtime = "eager"
    time_batch: TimeBatch = 1
    time_size: TimeSize = None
    times: Times = None
    layout: Annotated[
        Literal["adaptive", "native"],
        Help("adaptive: every layer its own width; native: loads in the stock diffusers class."),
    ] = "adaptive"
    blocks: Annotated[
        bool, Help("Whole residual blocks may go too; with --layout native nothing but blocks goes.")
    ] = False
    contiguous: Annotated[
        bool, Help("Of the blocks of a stack, neighbours go: one run of them (with --blocks).")
    ] = False
    fold: Annotated[
        float | None,
        Ge(0),
        Lt(1),
        Help(
            "Relative error to which layers that see timestep and pooled conditions alone are factored; 0: "
            "none (default: 0.01 for transformers whose parameters bind, else 0)."
        ),
    ] = None
    prune_width: Annotated[bool, Help("The residual width of a transformer may narrow too.")] = False
    keep_interfaces: Annotated[
        bool, Help("Keep the channels at which ControlNets, T2I adapters and IP-Adapters enter.")
    ] = False
    criterion: Annotated[CriterionName, Help("How units are scored (docs/method.md).")] = "taylor"
    iterations: Annotated[int, Ge(1), Le(1000), Help("Scorings; the budget tightens after each.")] = 1
    draws: Annotated[int, Ge(1), Le(10**6), Help("Noisy samples per scoring.")] = 64
    bound: Annotated[float, Gt(0), Le(1), Help("Largest move of a mask entry in one iteration.")] = 0.5
    one_shot: Annotated[bool, Help("Score once and mask at once: no soft masks.")] = False
    refit: Annotated[
        bool, Help("Fit what reads masked units to the dense network's outputs, by least squares.")
    ] = True
    recover: Annotated[
        int,
        Ge(0),
        Le(10**8),
        Help("Training steps after removal, with the dense network as teacher; 0 for none."),
    ] = 50
    align: Annotated[int, Ge(1), Le(1024), Help("Round widths to a multiple.")] = 1
    data: Annotated[
        str | None, Help("Image folder, .npz or Hugging Face dataset id (default: drawn from the model).")
    ] = None
    images: Annotated[int, Ge(2), Le(10**7), Help("Images to draw, or to take from --data.")] = 64
    sample_steps: Annotated[int, Ge(1), Le(1000), Help("Sampling steps of a drawn calibration image.")] = 20
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Help("Of recovery and timed passes (default: bf16 on CUDA, else fp32); all else is fp32."),
    ] = None
    prompts: PromptsFile = None
    size: Size = None
    frames: Frames = None
    guidance: GuidanceScale = None
    seed: Annotated[int, Ge(0), Lt(2**63), Help("Of every random number in the run.")] = 0

    def __post_init__(self) -> None:
        if self.speedup is not None and self.latency is not None:
            raise UsageError("--speedup and --latency say the same in two ways: drop one of the two")
        check_time_options(self, self.timed, "--speedup or --latency")
        if len(self.targets) > 1:
            self.check_targets()
        if self.keep_loss is not None:
            self.check_keep_loss(self.keep_loss)
        if self.component == ALL:
            self.check_all()
        if self.one_shot:
            refuse_idle(self, "--one-shot", "iterations", "bound")
        if not self.removes:
            scoring = ("criterion", "iterations", "draws", "bound", "one_shot", "recover", "align")
            refuse_idle(self, "--sparsity 0", *scoring)
        if self.layout == "native":
            refuse_idle(self, "--layout native", "align")
        if self.contiguous and not self.blocks:
            raise UsageError("--contiguous is about blocks: add --blocks")

    def check_targets(self) -> None:
        """Refuse what does not go with several sparsities."""
        if 0 in self.targets:
            raise UsageError("--sparsity 0 removes nothing: it cannot stand beside others")
        if self.layout == "native":
            raise UsageError("--layout native makes one network: repeat the command, not --sparsity")
        if self.timed:
            raise UsageError("--speedup and --latency make one network: repeat the command, not --sparsity")

    def check_all(self) -> None:
        """Refuse what does not go with every denoiser of a pipeline."""
        if len(self.targets) > 1:
            raise UsageError(
                "--component all makes one checkpoint: give --sparsity once, or name a component"
            )
        if self.times is not None:
            raise UsageError("--times holds the layers of one network: name its --component")

    def check_keep_loss(self, limit: float) -> None:
        """Refuse what does not go with a limit of the loss."""
        flag = f"--keep-loss {limit:g}"
        if len(self.targets) > 1:
            raise UsageError(f"{flag} makes one network: give --sparsity once, as the most that may go")
        if not self.removes:
            raise UsageError(f"--sparsity 0 removes nothing that {flag} could limit: drop one")
        if self.layout == "native":
            raise UsageError(f"{flag} needs more widths than --layout native has: drop one of the two")

    @property
    def timed(self) -> bool:
        """Whether time is what a budget is of."""
        return self.speedup is not None or self.latency is not None

    @property
    def targets(self) -> tuple[float, ...]:
        """Every sparsity that is asked for, the least first."""
        if self.sparsity is None or self.sparsity == ():
            return (0.0 if self.timed else 0.5 if self.keep_loss is None else MOST,)
        return tuple(sorted(set(self.sparsity))) if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def goal(self) -> float:
        """The largest sparsity that is asked for."""
        return self.targets[-1]

    @property
    def removes(self) -> bool:
        """Whether channels or blocks go; else modulation is folded alone."""
        return bool(self.goal) or self.timed

    def up_to(self, number: int) -> "PruneRecipe":
        """The recipe whose last network is the one of a target: what comes after does not change it."""
        return replace(self, sparsity=self.targets[: number + 1])

    def document(self) -> dict[str, Any]:
        """The resolved recipe, as it is written and read."""
        targets = self.targets
        return super().document() | {"sparsity": list(targets) if len(targets) > 1 else targets[0]}
