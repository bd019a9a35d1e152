"""One prune run: from a dense network in memory to a narrow one."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.reader import (
    build_meta,
    cast_model,
    load_model,
    load_scheduler,
    scheduler_config_path,
    sha256_of_weights,
)
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.state import StateFolder
from gfprune_cli.checkpoint.writer import stored_dtype
from gfprune_cli.data.calibration import ImageRequest, PipelineOptions, training_process
from gfprune_cli.data.conditions import Condition, call
from gfprune_cli.data.diffusion import NoisingProcess
from gfprune_cli.data.draws import Draws
from gfprune_cli.data.measure import REPORT_DRAWS, Network, denoising_loss, one_sample
from gfprune_cli.device import default_precision
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.loop import PruningLoop, scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.flow.training import Trainer
from gfprune_cli.memory import FLOAT, Need, activations, check_memory, offload
from gfprune_cli.progress import Event, Report, notice
from gfprune_cli.pruning.plan import Plan, uniform_scores
from gfprune_cli.pruning.result import as_json, installed_tools
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.latency import default_align
from gfprune_cli.structure.removal import carry_over, remove, remove_native
from gfprune_cli.structure.verify import check_removal

SCORE_CHUNK = 16
REPORT_SHARE = 4  # one image in so many is kept for the reported losses
COARSE_EVERY = 4
# copies of the weights that are in memory at once: weights, masked weights, gradients, products
SCORING_COPIES = {"magnitude": 3, "random": 2, "taylor": 4, "gradient-flow": 6, "gradient-flow-abs": 6}
TRAINING_COPIES = 4
ADAM_COPIES = 2
REMEDY = "use --offload-teacher, --one-shot, a smaller --batch, or a larger device"


@dataclass(frozen=True)
class Scored:
    """A dense network behind masks, draws to measure it on, and scores by group name [units]."""

    masked: MaskedModel
    draws: Draws
    scores: Mapping[str, torch.Tensor]


class Run:
    """One prune run: its inputs, and the steps from dense to pruned network."""

    def __init__(
        self,
        recipe: PruneRecipe,
        source: Source,
        plan: Plan,
        device: torch.device,
        report: Report,
        *,
        offload_teacher: bool = False,
    ) -> None:
        self.recipe, self.source, self.plan, self.device, self.report = recipe, source, plan, device, report
        self.offload_teacher = offload_teacher and device.type != "cpu"
        self.hashes = sha256_of_weights(plan.component)
        scheduler = load_scheduler(plan.component)
        if scheduler is None:
            raise GfpruneError(
                f"{plan.component.root} has no scheduler: gfprune needs the noise the model was trained with"
            )
        if scheduler_config_path(plan.component) is None:
            notice(
                report,
                "no scheduler beside the model: assuming the default DDPM schedule (linear, 1000 steps)",
            )
        self.scheduler = scheduler
        self.process: NoisingProcess = training_process(plan.component, scheduler)
        self.schedule = schedule_of(recipe)
        self.allocation = None if plan.native is not None else recipe.allocation or default_allocation(recipe)
        self.precision = recipe.precision or default_precision(device)
        self.align = recipe.align if isinstance(recipe.align, int) else default_align(device)
        check_memory(self.need(0), device, REMEDY)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that left the state."""
        addresses = ("model", "revision", "variant")  # the hashes below say what they stood for
        settings = {key: value for key, value in self.recipe.document().items() if key not in addresses}
        inputs = {"config": self.plan.component.config, "scheduler": dict(self.scheduler.config)}
        return {
            **settings,
            "weights": self.hashes,
            "commit": self.source.commit,
            "device": self.device.type,
            **{name: as_json(value) for name, value in inputs.items()},
            "tools": installed_tools(),
        }

    def need(self, kept: int) -> Need:
        """The most memory that the run will hold at once; on CUDA batches shrink to what fits.

        Args:
            kept: numbers that autograd keeps for one sample.
        """
        copies = SCORING_COPIES.get(self.recipe.criterion, SCORING_COPIES["taylor"])
        if self.schedule.training_steps:
            teacher = int(self.recipe.distill > 0 and not self.offload_teacher)
            copies = teacher + ADAM_COPIES + max(TRAINING_COPIES, copies)
        samples = 1 if self.device.type == "cuda" else max(SCORE_CHUNK, self.recipe.batch)
        return Need(copies * self.plan.cost.params({}) * FLOAT, samples * kept * FLOAT)

    def execute(
        self, state: StateFolder
    ) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, float], float]:
        """The pruned network, kept units by group, losses, and the cost of scoring in gradients."""
        self.report(Event("load", text="reading weights"))
        dense = self.load()
        self.report(Event("calibrate", text="preparing calibration images"))
        draws, reports = self.draws(dense)
        state.identity["data contents"] = self.data_fingerprint
        check_memory(self.need(activations(self.plan.component, self.process, draws)), self.device, REMEDY)
        self.report(Event("check", text="checking that removal is exact"))
        check_removal(dense, self.plan.groups, one_sample(self.process, draws))
        before = self.loss(reports, dense)
        teacher = None
        if self.schedule.training_steps and self.recipe.distill:
            teacher = copy.deepcopy(dense)
            if self.offload_teacher:
                offload(teacher, self.device)
        masked = MaskedModel(dense.requires_grad_(True), self.plan.groups)
        loop = self.loop(masked, teacher, draws, state)
        kept = loop.run()
        losses = {"before": before, "masked": self.masked_loss(reports, masked)}
        self.report(Event("remove", text="removing channels"))
        model = self.removed(masked, kept)
        losses["removed"] = self.loss(reports, nn.Module.to(copy.deepcopy(model), torch.float32))
        return model, kept, losses, loop.flow.gradients

    def load(self) -> nn.Module:
        """The dense network on the run's device, frozen."""
        model = load_model(self.plan.component).requires_grad_(False)
        if self.device.type == "cuda":
            model = nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return nn.Module.to(model, self.device)

    def draws(self, dense: nn.Module) -> tuple[Draws, Draws]:
        """Draws for scoring and training, and for the reported losses; from different images."""
        images, conditions = self.images(dense)
        split = len(images) - max(1, len(images) // REPORT_SHARE)
        parts = [
            Draws(
                images[part],
                self.process.steps,
                self.recipe.seed,
                None if conditions is None else conditions[part],
            )
            for part in (slice(split), slice(split, None))
        ]
        return parts[0], parts[1]

    def scored(self) -> "Scored":
        """The dense network under full masks, with Taylor scores: what a sensitivity probe starts from."""
        dense = self.load()
        draws, reports = self.draws(dense)
        masked = MaskedModel(dense, self.plan.groups)
        losses = scoring_losses(masked, self.process, draws, 1, self.recipe.draws, SCORE_CHUNK, self.report)
        return Scored(masked, reports, score("taylor", Evidence(masked, losses, self.recipe.seed)))

    def loop(
        self, masked: MaskedModel, teacher: nn.Module | None, draws: Draws, state: StateFolder
    ) -> PruningLoop:
        recipe = self.recipe
        trainer = Trainer(
            masked,
            None if teacher is None else partial(call, teacher),
            self.process,
            draws,
            recipe.batch,
            recipe.learning_rate,
            self.schedule.training_steps,
            recipe.distill,
            self.precision,
        )
        return PruningLoop(
            masked,
            trainer,
            self.process,
            self.schedule,
            recipe.criterion,
            self.allocator(),
            draws,
            recipe.draws,
            SCORE_CHUNK,
            state,
            self.report,
            self.allocation == "measured",
        )

    def allocator(self) -> Any:
        """(scores, progress in [0, 1]) -> channels kept by each group."""
        plan, recipe = self.plan, self.recipe

        def adaptive(scores: Mapping[str, torch.Tensor], progress: float) -> Mapping[str, int]:
            target = recipe.sparsity * progress
            try:
                final = progress >= 1 and not plan.nearest
                widths = allocate(
                    plan.cost, scores, target, budget=recipe.budget, align=self.align, strict=final
                )
            except (
                UsageError
            ):  # these scores end short of the budget; equal ones did not, when it was planned
                widths = allocate(plan.cost, uniform_scores(plan.groups), target, budget=recipe.budget)
            return widths.kept

        def native(scores: Mapping[str, torch.Tensor], progress: float) -> Mapping[str, int]:
            assert plan.native is not None
            kept = {}
            for group in plan.groups:
                goal = plan.native.kept[group.name]
                units = round((group.channels - (group.channels - goal) * progress) / group.unit_size)
                kept[group.name] = max(goal, units * group.unit_size)
            return kept

        return adaptive if plan.native is None else native

    def images(self, dense: nn.Module) -> tuple[torch.Tensor, Condition]:
        """Calibration images [N, ...] as the network sees them, and their conditions."""
        recipe = self.recipe
        options = PipelineOptions.of(recipe)
        request = ImageRequest(recipe.data, recipe.images, recipe.sample_steps, recipe.seed, options)
        found = request.answer(dense, self.plan.component, self.scheduler, self.hashes, self.report)
        self.data_fingerprint = found.fingerprint
        self.process = found.process
        return found.images.to(self.device), found.conditions

    def loss(self, draws: Draws, model: nn.Module) -> float:
        """Denoising loss of a network over the fixed report draws."""
        return self.measured(draws, partial(call, model))

    @torch.no_grad()
    def masked_loss(self, draws: Draws, masked: MaskedModel, count: int = REPORT_DRAWS) -> float:
        effective = {name: tensor.detach() for name, tensor in masked.effective().items()}
        return self.measured(draws, partial(masked.forward, effective), count)

    def measured(self, draws: Draws, network: Network, count: int = REPORT_DRAWS) -> float:
        return denoising_loss(network, self.process, draws, count, self.report)

    def removed(self, masked: MaskedModel, kept: Mapping[str, torch.Tensor]) -> nn.Module:
        """The narrow network, from trained weights in the stock module tree."""
        dense = carry_over(masked.model, build_meta(self.plan.component)).requires_grad_(False)
        trained = {name: weight.detach().cpu() for name, weight in masked.model.state_dict().items()}
        dense.load_state_dict(trained, assign=True)
        if self.plan.native_config is not None:
            model = remove_native(dense, self.plan.groups, kept, self.plan.native_config)
        else:
            model = remove(dense, self.plan.groups, kept)
        # what is checked, measured and written is one and the same
        cast_model(model, stored_dtype(self.plan.component))
        for name, tensor in model.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise GfpruneError(f"tensor {name} is not finite after pruning: lower --learning-rate")
        return nn.Module.to(model, self.device)


def default_allocation(recipe: PruneRecipe) -> str:
    """Measured, but for the criterion as it was published, and for the one that knows nothing.

    The absolute flow holds curvature: per parameter its sums compare groups better than measurements do, per
    MAC they do not (docs/benchmarks/groups.md).
    """
    by_scores = recipe.criterion in ("gradient-flow", "random")
    by_scores |= recipe.criterion == "gradient-flow-abs" and recipe.budget == "params"
    return "scores" if by_scores else "measured"


def schedule_of(recipe: PruneRecipe) -> Schedule:
    if recipe.one_shot:
        return Schedule(sparsity=recipe.sparsity, iterations=1, steps_per_iteration=0, bound=1, score_every=1)
    return Schedule(
        sparsity=recipe.sparsity,
        iterations=recipe.iterations,
        steps_per_iteration=recipe.steps_per_iteration,
        bound=recipe.bound,
        score_every=COARSE_EVERY if recipe.coarse else 1,
    )
