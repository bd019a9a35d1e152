"""The options of `gfprune finetune`."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Lt

from gfprune_cli.recipes.options import Frames, GuidanceScale, Help, PromptsFile, Recipe, Size

# peak learning rates: of AdamW, of each optimiser of matrices, of adapters and Adafactor
RATE, MUON_RATE, SOAP_RATE, HIGH_RATE = 1.5e-3, 2e-3, 6e-3, 1e-2
LEAST_GONE = 0.1  # share of the parameters that counts as gone in any case
SMALL_NETWORK = 50_000_000  # parameters that train, up to which the bases of SOAP cost little
FEATURES = 0.3  # weight of feature distillation
DENOISE = 0.1  # weight of the data's own loss
# Samples of a run up to which rates and weights above hold. Beyond, the data and high rates lead away from
# the teacher, and features, whose weight decays to 0 within them, cost loss.
SHORT_RUN = 3200


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Everything that decides the bytes of a finetune run's output."""

    model: Annotated[str, Help("A checkpoint that gfprune prune wrote: a local folder, or a Hub id.")]
    revision: Annotated[str | None, Help("Hub branch, tag or commit of the model.")] = None
    variant: Annotated[str | None, Help("Weights variant of the teacher, such as fp16.")] = None
    component: Annotated[str | None, Help("Pipeline component to train (default: the denoiser).")] = None
    teacher: Annotated[
        str | None, Help("The dense model (default: the one the checkpoint was pruned from).")
    ] = None
    teacher_revision: Annotated[str | None, Help("Hub branch, tag or commit of the teacher.")] = None
    data: Annotated[
        str, Help("self (images drawn from the teacher), an image folder, .npz or Hugging Face dataset id.")
    ] = "self"
    images: Annotated[
        int | None, Ge(2), Le(10**7), Help("Images to draw (default: 512), or to take from --data (all).")
    ] = None
    sample_steps: Annotated[int, Ge(1), Le(1000), Help("Sampling steps of a drawn image.")] = 20
    steps: Annotated[int, Ge(1), Le(10**8), Help("Training steps.")] = 1000
    batch: Annotated[int, Ge(1), Le(65536), Help("Samples per step, over all processes.")] = 8
    micro_batch: Annotated[
        int | None, Ge(1), Le(65536), Help("Samples per pass and process; gradients add up (default: all).")
    ] = None
    lora: Annotated[
        int | None,
        Ge(1),
        Le(4096),
        Help("Train adapters of this rank alone, on the layers that were pruned."),
    ] = None
    by_block: Annotated[
        bool, Help("Train one block after the other towards its dense twin: gradients of one at a time.")
    ] = False
    optimizer: Annotated[
        Literal["soap", "muon", "adamw", "adamw8bit", "adafactor"] | None,
        Help(
            "soap and muon know layers as matrices; adafactor keeps almost no state (default: soap; muon with"
            " --lora, above 50 million parameters and for networks in pieces)."
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Gt(0),
        Le(1),
        Help(
            "Peak (default: with soap 6e-3 times the share of the parameters that is gone, less in runs of"
            " more than 3200 samples; 2e-3 with muon, 1.5e-3 AdamW, 1e-2 adafactor and with --lora; less"
            " where the network has been trained before)."
        ),
    ] = None
    warmup: Annotated[int, Ge(0), Le(10**8), Help("Steps until the learning rate peaks.")] = 10
    weight_decay: Annotated[float, Ge(0), Le(1), Help("Decoupled, as AdamW does it.")] = 0.0
    clip: Annotated[float, Gt(0), Help("Largest gradient norm.")] = 1.0
    ema: Annotated[
        float, Ge(0), Lt(1), Help("Largest decay of the weight average that is written; 0: none.")
    ] = 0.9999
    denoise: Annotated[
        float | None,
        Ge(0),
        Help(
            "Weight of the denoising loss (default: 0.1; 320 over the number of samples in a run of more than"
            " 3200 with a teacher)."
        ),
    ] = None
    distill: Annotated[float, Ge(0), Help("Weight of output distillation from the teacher.")] = 0.9
    features: Annotated[
        float | None,
        Ge(0),
        Help(
            "Weight of feature distillation on the kept channels, in the first 3200 samples (default: 0.3;"
            " 0 with --lora, --checkpointing or --distill 0)."
        ),
    ] = None
    jacobian: Annotated[float, Ge(0), Help("Weight of Jacobian matching; doubles the passes.")] = 0.0
    image_weight: Annotated[
        float, Ge(0), Help("Cap of what errors of the image count beside errors of the noise; 0: nothing.")
    ] = 20.0
    min_snr: Annotated[
        float | None, Gt(0), Help("Min-SNR gamma, such as 5, in the place of --image-weight.")
    ] = None
    timesteps: Annotated[
        Literal["adaptive", "stratified", "antithetic", "uniform"],
        Help("How noise levels are drawn; adaptive: most where the loss is large, which then counts less."),
    ] = "adaptive"
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, Help("Of the passes (default: bf16 on CUDA, else fp32).")
    ] = None
    teacher_precision: Annotated[
        Literal["fp32", "bf16"], Help("Of the teacher's weights while the student trains.")
    ] = "fp32"
    channels_last: Annotated[bool | None, Help("Memory format (default: on CUDA and CPU).")] = None
    checkpointing: Annotated[bool, Help("Recompute activations: slower, less memory.")] = False
    compile: Annotated[bool, Help("Compile the networks with torch.compile.")] = False
    prompts: PromptsFile = None
    size: Size = None
    frames: Frames = None
    guidance: GuidanceScale = None
    seed: Annotated[int, Ge(0), Lt(2**63), Help("Of every random number in the run.")] = 0

    def settled(
        self,
        parameters: float,
        *,
        left: float | None = None,
        excess: float = 0.0,
        sharded: bool = False,
        trained: int = 0,
    ) -> Self:
        """The recipe with an optimizer and a peak learning rate: those given, or those of docs/finetuning.md.

        Args:
            parameters: that train at a time.
            left: share of the dense network's parameters, where it is known. At SOAP's full rate the samples
                of a network that has lost little, or trains long, drift away from its teacher's.
            excess: of its loss over the dense network's, as a share of the latter. What loses more has
                farther to go before a run is long.
            sharded: whether the processes hold one network in pieces.
            trained: steps that the weights have behind them. The rate starts where a line down to 0 over all
                steps would be by now: at the full rate, a short run undoes what was reached before it.
        """
        large = parameters > SMALL_NETWORK or self.lora is not None or sharded
        optimizer = self.optimizer or ("muon" if large else "soap")
        gone = 1 if left is None else max(LEAST_GONE, 1 - left)
        soap = SOAP_RATE * gone * min(1.0, self.length_factor * max(1.0, excess)) ** 0.5
        rates = {"soap": soap, "muon": MUON_RATE, "adafactor": HIGH_RATE}
        usual = HIGH_RATE if self.lora is not None else rates.get(optimizer, RATE)
        peak = self.learning_rate or usual * self.steps / (trained + self.steps)
        return replace(self, optimizer=optimizer, learning_rate=peak)

    @property
    def length_factor(self) -> float:
        """What a short run's samples are of this run's, and no more than 1."""
        return min(1.0, SHORT_RUN / (self.steps * self.batch))

    @property
    def denoise_weight(self) -> float:
        """The weight of the denoising loss: the one given; or 0.1, and less in a long run that is taught."""
        if self.denoise is not None:
            return self.denoise
        return DENOISE * self.length_factor if self.distill else DENOISE

    @property
    def feature_weight(self) -> float:
        """The weight of features: the one given; or 0.3 in runs that are taught, and not short of memory."""
        without = self.checkpointing or self.lora is not None or self.by_block or not self.distill
        return self.features if self.features is not None else (0.0 if without else FEATURES)

    @property
    def feature_steps(self) -> int:
        """Within which the weight of features decays to 0: no more than the run has."""
        return min(self.steps, max(1, SHORT_RUN // self.batch))
