"""One prune run: from a dense network in memory to a narrow one."""

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.reader import build_meta, cast_model, check_weights, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import as_json, installed_tools
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import stored_dtype
from gfprune_cli.data.calibration import ImageRequest, PipelineOptions, training_process
from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.finite import NotFinite
from gfprune_cli.diffusion.loss import Network, denoising_loss, one_sample
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.families.table import has_known_inputs
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.loop import SCORE_CHUNK, LoopState, PruningLoop, look_for_timesteps, scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.flow.schedule import Schedule
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.outputs.state import StateFolder, run_digest
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.pruning.fold import Folder, Folding, folding_attempt
from gfprune_cli.pruning.memory import FLOAT, MemoryPlan, Pass, available, one_pass
from gfprune_cli.pruning.phases import LOSSES, RECOVERING, SCORING, alternatives, phases_of
from gfprune_cli.pruning.plan import Plan, folded_plan, uniform_scores
from gfprune_cli.pruning.probes import Probes
from gfprune_cli.pruning.state import Outcome, RecoveryState
from gfprune_cli.pruning.verify import check_removal
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery.recover import channels_last, recover
from gfprune_cli.recovery.trainer import Remedies
from gfprune_cli.runtime.device import default_precision, offload
from gfprune_cli.runtime.processes import Processes
from gfprune_cli.structure.removal import carry_over, remove, remove_native, skeleton
from gfprune_cli.timing.budget import TimeBudget

REPORT_SHARE = 4  # one image in so many is kept for the reported losses
LOSS_DRAWS = 128  # noisy samples behind each reported loss
JUDGE_DRAWS = 32  # of them, behind each loss that judges a refit
SAVE_EVERY = 100  # recovery steps
RECOVERY_REMEDIES = Remedies(
    not_finite="use --recover 0 and gfprune finetune with a lower --learning-rate",
    memory="use --recover 0 and gfprune finetune with --checkpointing, or a larger device",
)


@dataclass(frozen=True)
class Scored:
    """A dense network behind masks, draws to measure it on, and scores by group name [units]."""

    masked: MaskedModel
    draws: Draws
    scores: Mapping[str, torch.Tensor]


class PruneJob:
    """One prune run: its inputs, and the steps from dense to pruned network.

    To make one is to take every check that reads no weight; a dry run does, and goes no further.

    Raises:
        UsageError: settings that do not fit the checkpoint; GfpruneError: what no run can work on.
    """

    def __init__(
        self,
        recipe: PruneRecipe,
        source: Source,
        plan: Plan,
        device: torch.device,
        progress: Progress,
        *,
        offload_teacher: bool = False,
    ) -> None:
        self.recipe, self.source, self.plan, self.device, self.progress = (
            recipe,
            source,
            plan,
            device,
            progress,
        )
        self.offload_teacher = offload_teacher and device.type != "cpu"
        scheduler = load_scheduler(plan.component)
        if scheduler is None:
            raise GfpruneError(
                f"{plan.component.root} has no scheduler: gfprune needs the noise the model was trained with"
            )
        if scheduler_config_path(plan.component) is None:
            notice(
                progress,
                "no scheduler beside the model: assuming the default DDPM schedule (linear, 1000 steps)",
            )
        self.scheduler = scheduler
        self.process: NoisingProcess = training_process(plan.component, scheduler)
        options = PipelineOptions.of(recipe)
        self.request = ImageRequest(recipe.data, recipe.images, recipe.sample_steps, recipe.seed, options)
        network: Any = build_meta(plan.component)
        self.request.check(plan.component, network.config, scheduler)
        check_weights(plan.component, network)
        self.schedule = schedule_of(recipe)
        self.steps = recipe.recover if recipe.removes else 0  # folding alone leaves nothing to mend
        self.folding: Folding | None = None
        self.given = plan  # that of the network as it was given; `plan` is for what it was folded to
        self.precision = recipe.precision or default_precision(device)
        self.free = available(device)
        known = example_inputs(network) if has_known_inputs(network) else None
        self.plan_memory(Pass() if known is None else one_pass(network, known))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file."""
        return sha256_of_weights(self.plan.component)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that left the state."""
        addresses = (
            "model",
            "revision",
            "variant",
            "config_from",
            "times",
        )  # the hashes below say what they stood for
        settings = {key: value for key, value in self.recipe.document().items() if key not in addresses}
        inputs = {"config": self.plan.component.config, "scheduler": dict(self.scheduler.config)}
        return {
            **settings,
            "weights": self.hashes,
            "commit": self.source.commit,
            "device": self.device.type,
            **{name: as_json(value) for name, value in inputs.items()},
            **self.given_times(),
            "tools": installed_tools(),
        }

    def given_times(self) -> dict[str, Any]:
        """The table of `--times`: it decides widths. One that is measured does so as well, but never twice in
        the same way: its run says what it found."""
        given = self.plan.time if self.recipe.times is not None else None
        return {} if given is None else {"times": run_digest(given.table.document())}

    def plan_memory(self, one: Pass) -> None:
        """Decide how many samples go through a network at once, in each phase.

        Second derivatives are taken exactly only where there is memory for that.

        Args:
            one: what one sample takes in the dense network.

        Raises:
            GfpruneError: the run does not fit.
        """
        recipe, offload = self.recipe, self.offload_teacher
        params = self.plan.cost.params({})
        others = alternatives(recipe, one, offload=offload, device=self.device.type, params=params)
        plans = [
            MemoryPlan(
                self.device,
                self.free,
                params * FLOAT,
                phases_of(recipe, one, offload=offload, second_order=second_order, params=params),
                others,
            )
            for second_order in ((True, False) if recipe.criterion.startswith("gradient-flow") else (False,))
        ]
        self.memory = next((plan for plan in plans if plan.fits(plan.phases)), plans[-1])
        self.memory.check()
        self.exact = self.memory is plans[0]
        self.fused = one.fuses

    def execute(self, state: StateFolder) -> tuple[nn.Module, Outcome]:
        """The pruned network, and what was measured on the way."""
        self.progress(Event("load", text="reading weights"))
        dense = self.load()
        self.progress(Event("calibrate", text="preparing calibration images"))
        draws, held_out = self.draws(dense)
        state.identity["data contents"] = self.data_fingerprint
        recovery = RecoveryState(state)
        before = 0.0 if recovery.begun() else self.loss(held_out, dense)
        if self.plan.fold:
            dense = self.fold(dense, draws, held_out)
        self.progress(Event("check", text="checking that removal is exact"))
        if self.plan.groups:
            check_removal(dense, self.plan.groups, one_sample(self.process, draws))
        if not recovery.begun():
            outcome, trained = self.prune(dense, draws, held_out, state, before)
            narrow = self.narrow(trained, outcome.kept)
            outcome.losses["removed"] = self.loss(held_out, narrow)
            gap = outcome.losses.pop("judged", None)
            if gap is not None:  # of two networks that should be one, on the same few draws
                removed = self.loss(held_out, narrow, JUDGE_DRAWS)
                outcome.losses["masked"] = outcome.losses["removed"] + gap - removed
        else:
            outcome = recovery.outcome()
            narrow = self.narrow(dense, outcome.kept)
        if self.steps:
            self.recover(narrow, self.teacher(dense), draws, recovery.of(outcome))
        model = self.stored(narrow)
        if self.steps:
            outcome.losses["recovered"] = self.loss(
                held_out, nn.Module.to(copy.deepcopy(model), torch.float32)
            )
        return model, outcome

    def fold(self, dense: nn.Module, draws: Draws, held_out: Draws) -> nn.Module:
        """The dense network with layers that see few inputs as two; the plan is then for that."""
        shape = tuple(draws.images.shape[1:])
        probes = Probes(self.process, self.conditions, shape, self.device, self.recipe.seed)
        dtype = stored_dtype(self.plan.component)
        folder = Folder(dense, probes, self.plan.fold, dtype, self.progress)
        asked = self.recipe.fold is not None or not self.recipe.removes
        found = folding_attempt(folder, self.process, held_out, asked=asked)
        if found is None:
            return dense
        network, self.folding = found
        self.plan = folded_plan(self.plan, network, self.recipe, self.progress)
        if self.device.type == "cuda":
            network = channels_last(network)
        return nn.Module.to(network, self.device)

    def prune(
        self, dense: nn.Module, draws: Draws, held_out: Draws, state: StateFolder, before: float
    ) -> tuple[Outcome, nn.Module]:
        """Let the masks flow to their end; the network after the last refit, all of its channels there.

        Args:
            before: loss of the network as it was given.
        """
        if not self.recipe.removes:
            kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in self.plan.groups}
            return Outcome(kept, {"before": before}), dense
        student = copy.deepcopy(dense) if self.recipe.refit or self.steps else dense
        if student is not dense and self.offload_teacher:
            offload(dense, self.device)
        masked = MaskedModel(student.requires_grad_(True), self.plan.groups)
        loop = self.loop(masked, dense, draws, held_out, state)
        kept = loop.run()
        refits = loop.state.refits
        judged = refits[-1].after if refits else self.masked_loss(held_out, masked, JUDGE_DRAWS)
        losses = {"before": before, "judged": judged, "masked": judged}
        return Outcome(kept, losses, refits, loop.state.gradients), masked.model

    def teacher(self, dense: nn.Module) -> nn.Module:
        """The network as it was given, whatever it was folded to."""
        if self.folding is None:
            return dense
        teacher = self.load()
        if self.offload_teacher:
            offload(teacher, self.device)
        return teacher

    def recover(self, narrow: nn.Module, dense: nn.Module, draws: Draws, state: RecoveryState) -> None:
        """Train the narrow network with the dense one as its teacher."""
        recipe = FinetuneRecipe(
            model=self.recipe.model,
            steps=self.steps,
            seed=self.recipe.seed,
            micro_batch=self.memory.at_once(RECOVERING),
        )
        recover(
            channels_last(narrow),
            channels_last(dense),
            self.process,
            draws,
            recipe,
            processes=Processes(None, self.device),
            precision=self.precision,
            state=state,
            progress=self.progress,
            save_every=SAVE_EVERY,
            remedies=RECOVERY_REMEDIES,
        )

    def load(self) -> nn.Module:
        """The dense network on the run's device, frozen."""
        model = load_model(self.plan.component).requires_grad_(False)
        if self.device.type == "cuda":
            model = channels_last(model)
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
        draws, held_out = self.draws(dense)
        masked = MaskedModel(dense, self.plan.groups)
        count = self.recipe.draws
        piece = self.memory.at_once(SCORING)
        losses = scoring_losses(
            masked, self.process, draws, 1, count, SCORE_CHUNK, self.progress, piece=piece
        )
        try:
            scores = score("taylor", Evidence(masked, losses, self.recipe.seed, fused=self.fused))
        except NotFinite:
            look_for_timesteps(masked, self.process, draws, 1, count, piece)
            raise
        return Scored(masked, held_out, scores)

    def loop(
        self, masked: MaskedModel, dense: nn.Module, draws: Draws, held_out: Draws, state: StateFolder
    ) -> PruningLoop:
        recipe = self.recipe
        refit = None
        if recipe.refit:
            sample = one_sample(self.process, draws)
            residuals = find_residuals(dense, {**sample, "return_dict": False})
            refit = Refit(masked, dense, residuals, recipe.seed)

        def judge(of_dense: bool) -> float:
            if of_dense:
                return self.loss(held_out, dense, JUDGE_DRAWS)
            return self.masked_loss(held_out, masked, JUDGE_DRAWS)

        return PruningLoop(
            masked=masked,
            refit=refit,
            judge=judge,
            judging=JUDGE_DRAWS,
            process=self.process,
            schedule=self.schedule,
            criterion=recipe.criterion,
            allocate=self.allocator(dense, state),
            draws=draws,
            scoring_draws=recipe.draws,
            chunk=SCORE_CHUNK,
            piece=self.memory.at_once(SCORING),
            fused=self.fused,
            state=LoopState(way=None if self.exact else "finite-difference"),
            store=state,
            progress=self.progress,
            fixed=self.plan.native is not None,
        )

    def allocator(self, dense: nn.Module, state: StateFolder) -> Any:
        """(scores, share of the sparsity in [0, 1]) -> channels kept by each group."""
        plan, recipe = self.plan, self.recipe

        def adaptive(scores: Mapping[str, torch.Tensor], share: float) -> Mapping[str, int]:
            final = share >= 1 and not plan.nearest

            def widths(left: float | None = None) -> Mapping[str, int]:
                how: dict[str, Any] = {} if left is None else {"left": left}
                try:
                    return plan.allocate(scores, recipe, share, align=recipe.align, strict=final, **how).kept
                except UsageError:  # these scores end short of it; equal ones did not, when it was planned
                    return plan.allocate(uniform_scores(plan.groups), recipe, share, **how).kept

            if plan.time is None:
                return widths()
            kept = self.in_time(plan.time, widths, dense) if final else widths()
            state.facts = plan.time.facts()
            return kept

        def native(scores: Mapping[str, torch.Tensor], share: float) -> Mapping[str, int]:
            assert plan.native is not None
            kept = {}
            for group in plan.groups:
                goal = plan.native.kept[group.name]
                units = round((group.channels - (group.channels - goal) * share) / group.unit_size)
                kept[group.name] = max(goal, units * group.unit_size)
            return kept

        return adaptive if plan.native is None else native

    def in_time(
        self, time: TimeBudget, widths: Callable[[float | None], Mapping[str, int]], dense: nn.Module
    ) -> Mapping[str, int]:
        """Widths whose time was measured, if it can be."""
        if time.bench is None:
            return widths(None)

        def propose(left: float) -> Mapping[str, int] | None:
            with suppress(UsageError):  # the best of what was timed before stands
                return widths(left)
            return None

        folded = None if self.folding is None else skeleton(dense)
        return time.closed(self.plan.cost, propose, self.progress, folded)

    def images(self, dense: nn.Module) -> tuple[torch.Tensor, Condition]:
        """Calibration images [N, ...] as the network sees them, and their conditions."""
        found = self.request.answer(
            dense, self.plan.component, self.scheduler, self.hashes, self.progress, self.see_inputs
        )
        self.data_fingerprint = found.fingerprint
        self.process, self.conditions = found.process, found.conditions
        return found.images.to(self.device), found.conditions

    def see_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Plan anew with what the network is really given, before anything is drawn: a pipeline may pass it
        more than its configuration says."""
        self.plan_memory(one_pass(build_meta(self.plan.component), inputs))

    def loss(self, draws: Draws, model: nn.Module, count: int = LOSS_DRAWS) -> float:
        """Denoising loss of a network over the fixed report draws."""
        return self.measured(draws, partial(call, model), count)

    @torch.no_grad()
    def masked_loss(self, draws: Draws, masked: MaskedModel, count: int = LOSS_DRAWS) -> float:
        effective = {name: tensor.detach() for name, tensor in masked.effective().items()}
        return self.measured(draws, partial(masked.forward, effective), count)

    def measured(self, draws: Draws, network: Network, count: int) -> float:
        return denoising_loss(network, self.process, draws, count, self.progress, self.memory.at_once(LOSSES))

    def narrow(self, wide: nn.Module, kept: Mapping[str, torch.Tensor]) -> nn.Module:
        """The narrow network, in float32, from the weights of one with all channels."""
        self.progress(Event("remove", text="removing channels"))
        dense = carry_over(wide, skeleton(wide)).requires_grad_(False)
        weights = {name: weight.detach().cpu() for name, weight in wide.state_dict().items()}
        dense.load_state_dict(weights, assign=True)
        if self.plan.native_config is not None:
            model = remove_native(dense, self.plan.groups, kept, self.plan.native_config)
        else:
            model = remove(dense, self.plan.groups, kept)
        if not self.steps:
            cast_model(model, stored_dtype(self.plan.component))  # what is measured and written is one
            cast_model(model, torch.float32)
        return nn.Module.to(model, self.device)

    def stored(self, narrow: nn.Module) -> nn.Module:
        """The network in the type in which it is stored.

        Raises:
            GfpruneError: a weight is not finite; names it.
        """
        cast_model(narrow, stored_dtype(self.plan.component))
        for name, tensor in narrow.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise GfpruneError(
                    f"tensor {name} is not finite after pruning: {RECOVERY_REMEDIES.not_finite}"
                )
        return narrow


def schedule_of(recipe: PruneRecipe) -> Schedule:
    if recipe.one_shot:
        return Schedule(sparsity=recipe.sparsity, scorings=1, bound=1)
    return Schedule(sparsity=recipe.sparsity, scorings=recipe.iterations, bound=recipe.bound)
