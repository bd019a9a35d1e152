"""The narrow networks of a prune run: one for each sparsity, all of one flow."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.card import Picture
from gfprune_cli.checkpoint.reader import cast_model
from gfprune_cli.checkpoint.writer import stored_dtype
from gfprune_cli.data.sample_rows import Samples, dense_samples
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import one_sample
from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.outputs.durable import check_space
from gfprune_cli.outputs.locks import own_folder
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import Event, notice
from gfprune_cli.pruning.flows import Flow
from gfprune_cli.pruning.job import PruneJob, as_loaded
from gfprune_cli.pruning.loss_limit import LossLimit
from gfprune_cli.pruning.phases import CHECKING, LOSSES, RECOVERING
from gfprune_cli.pruning.state import Outcome, RecoveryState
from gfprune_cli.pruning.verify import check_removal
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.losses import FeaturePair
from gfprune_cli.recovery.recover import channels_last, recover
from gfprune_cli.recovery.teacher import layers_left
from gfprune_cli.recovery.trainer import Remedies
from gfprune_cli.runtime.device import is_elsewhere
from gfprune_cli.runtime.half import widen, without_reading
from gfprune_cli.structure.removal import carry_over, remove, remove_native, skeleton

Made = tuple[int, nn.Module, Outcome, Picture | None]  # number, network, what was measured, samples
SAVE_EVERY = 100  # recovery steps
RECOVERY_REMEDIES = Remedies(
    not_finite="use --recover 0 and gfprune finetune with a lower --learning-rate",
    memory="use --recover 0 and gfprune finetune with --checkpointing, or a larger device",
)


@dataclass
class Networks:
    """Makes the networks of a job.

    Args:
        states: the resumable state of each, the least sparse first. That of the next network is begun
            before the one before it trains: a stopped run finds the flow where it went on.
    """

    job: PruneJob
    states: Sequence[StateFolder]

    def make(self, done: Sequence[bool]) -> Iterator[Made]:
        """Each network that is not there yet."""
        place = self.states[0].folder
        with ExitStack() as stack:

            def new_folder() -> Path:
                check_space(place, self.job.memory.weights)  # or half of it
                return stack.enter_context(own_folder(place))

            self.job.new_folder = new_folder
            yield from self.made(done)

    def made(self, done: Sequence[bool]) -> Iterator[Made]:
        job, last = self.job, len(self.states) - 1
        dense, draws, held_out = job.prepared()
        self.shown = self.samples(dense)
        for state in self.states:
            state.identity["data contents"] = job.data_fingerprint
        first = self.first(done)
        trains = RecoveryState(self.states[first]).begun()
        before = 0.0 if trains and first == last else job.loss(held_out, dense)
        dense = job.fold(dense, draws, held_out)
        job.progress(Event("check", text="checking that removal is exact"))
        if job.plan.groups:
            inputs, how = one_sample(job.process, draws), job.memory.settings(CHECKING)
            check_removal(dense, job.plan.groups, inputs, **how)
        flow = Flow(job, dense, draws, held_out, several=last > 0 or job.recipe.keep_loss is not None)
        for number in range(first, last + 1):
            recovery = RecoveryState(self.states[number])
            begun = recovery.begun()
            if begun:
                outcome = recovery.outcome()
                narrow = self.narrow(dense, outcome.kept)
            else:
                outcome = self.outcome(flow, number, before)
                wide = flow.masked.model if job.recipe.removes else dense
                spent = flow.masked if last == 0 and wide is not dense else None
                narrow = self.narrow(wide, outcome.kept, spent)
                del wide, spent
            if number == last:
                if job.folding is not None and job.steps:
                    dense = flow.dense = nn.Module()  # what teaches is read anew, as it was given
                flow.let_go()  # what follows needs the memory of the masked network
            if not begun:
                take_losses(flow, outcome, narrow)
            if number < last and not begun:
                flow.loop(job.recipe.targets[number + 1], self.states[number + 1]).save()
            if not done[number]:
                model, picture = self.finished(narrow, dense, draws, held_out, recovery.of(outcome))
                yield number, model, outcome, picture

    def first(self, done: Sequence[bool]) -> int:
        """The network to begin with: the last one that a state stands before, of those up to the first that
        is not there."""
        missing = done.index(False)
        return max(number for number in range(missing + 1) if not number or self.states[number].exists())

    def outcome(self, flow: Flow, number: int, before: float) -> Outcome:
        """Let the masks flow to the next sparsity, or as far as the loss allows.

        Args:
            before: loss of the network as it was given.
        """
        job, recipe, state = self.job, self.job.recipe, self.states[number]
        if not recipe.removes:
            kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in job.plan.groups}
            return Outcome(kept, {"before": before})
        limit = None
        if recipe.keep_loss is not None:
            kept, limit = LossLimit(flow, state, recipe.keep_loss).run()
        else:
            target = recipe.targets[number] if job.plan.time is None else job.plan.most(recipe)
            flow.sparsity = recipe.targets[number - 1] if number else 0.0
            flow.drawn = number * flow.iterations
            kept = flow.run(flow.loop(target, state), target)
        judged = flow.refits[-1].after if flow.refits else flow.quick_loss(flow.masked)
        losses = {"before": before, "judged": judged, "masked": judged}
        return Outcome(kept, losses, flow.refits, flow.gradients, limit)

    def finished(
        self, narrow: nn.Module, dense: nn.Module, draws: Draws, held_out: Draws, state: RecoveryState
    ) -> tuple[nn.Module, Picture | None]:
        """The network as it is stored, after its recovery, and samples of it."""
        job = self.job
        if job.steps:
            self.recover(narrow, self.teacher(dense), draws, state)
            if len(self.states) > 1 and not is_elsewhere(dense):  # the next refit reads it as the first did
                as_loaded(dense, job.device)
        picture = None if job.steps else self.picture(narrow)  # it has the stored weights already
        model = stored(narrow, stored_dtype(job.plan.component))
        if job.steps:
            assert state.found is not None
            single = nn.Module.to(copy.deepcopy(model), torch.float32)
            state.found.losses["recovered"] = job.loss(held_out, single)
            picture = self.picture(single)
        return model, picture

    def samples(self, dense: nn.Module) -> Samples | None:
        """The dense row of the model card's picture; None where samples are no pictures."""
        job = self.job
        if not job.processes.main:
            return None
        unseen, at_once = range(job.split, len(job.found.images)), job.memory.at_once(LOSSES)
        return dense_samples(
            dense, job.plan.component, job.scheduler, job.request, job.found, unseen,
            self.poll, job.progress, at_once,
        )  # fmt: skip

    def picture(self, narrow: nn.Module) -> Picture | None:
        """Samples of the dense network and of a narrow one, from the same noise."""
        if self.shown is None:
            return None
        self.job.progress(Event("sample", text="drawing samples for the model card"))
        return self.shown.beside(narrow, self.poll, self.job.progress)

    def poll(self) -> None:
        """Asked before every pass of a sample: a signal may arrive within one."""
        self.job.progress(Event("pass"))

    def teacher(self, dense: nn.Module) -> nn.Module:
        """The network as it was given, whatever it was folded to."""
        teacher = dense if self.job.folding is None else self.job.load()
        self.job.put_elsewhere(teacher)
        return teacher

    def recover(self, narrow: nn.Module, dense: nn.Module, draws: Draws, state: RecoveryState) -> None:
        """Train the narrow network with the dense one as its teacher."""
        job = self.job
        widen(narrow)
        settings = state.trained_with(job.memory.settings(RECOVERING))
        pair = None if "features" in settings else self.pair(narrow, dense, state)
        if settings:
            notice(
                job.progress, f"memory is short: recovery trains as finetune does with {flags_of(settings)}"
            )
        recipe = FinetuneRecipe(
            model=job.recipe.model,
            steps=job.steps,
            seed=job.recipe.seed,
            micro_batch=job.memory.at_once(RECOVERING),
            **({"features": 0.0} if pair is None else {}) | settings,
        )
        recover(
            channels_last(narrow),
            channels_last(dense),
            job.process,
            draws,
            recipe,
            processes=job.processes,
            precision=job.precision,
            state=state,
            progress=job.progress,
            save_every=SAVE_EVERY,
            remedies=RECOVERY_REMEDIES,
            pair=pair,
        )

    def pair(self, narrow: nn.Module, dense: nn.Module, state: RecoveryState) -> FeaturePair | None:
        """Layers whose outputs are compared; none of a network that was folded."""
        if self.job.folding is not None:
            return None
        assert state.found is not None
        try:
            return FeaturePair(narrow, dense, layers_left(dense, self.job.plan.groups, state.found.kept))
        except GfpruneError:  # nothing was removed, or nothing that has an image in it
            return None

    def narrow(
        self, wide: nn.Module, kept: Mapping[str, torch.Tensor], spent: MaskedModel | None = None
    ) -> nn.Module:
        """The narrow network, from the weights of one with all channels, and kept as they are.

        Args:
            spent: the wide one behind masks, if nobody needs it any more: its weights go on the way.
        """
        job = self.job
        job.progress(Event("remove", text="removing channels"))
        dense = carry_over(wide, skeleton(wide)).requires_grad_(False)
        dense.load_state_dict(
            {name: one.detach().cpu() for name, one in wide.state_dict().items()}, assign=True
        )
        if spent is not None:
            spent.let_go()  # the weights of `dense` are now the last ones
        spend = spent is not None
        if job.plan.native_config is not None:
            model = remove_native(dense, job.plan.groups, kept, job.plan.native_config, spend=spend)
        else:
            model = remove(dense, job.plan.groups, kept, spend=spend)
        if not job.steps:
            cast_model(model, stored_dtype(job.plan.component))  # what is measured and written is one
            cast_model(model, torch.float32)
        return nn.Module.to(model, job.device)


def flags_of(settings: Mapping[str, Any]) -> str:
    """As on the command line of finetune."""
    return " ".join(
        f"--{name}"
        if value is True
        else f"--{name} {value:g}"
        if isinstance(value, float)
        else f"--{name} {value}"
        for name, value in settings.items()
    )


def take_losses(flow: Flow, outcome: Outcome, narrow: nn.Module) -> None:
    """The loss after removal, and what removal changed."""
    outcome.losses["removed"] = flow.job.loss(flow.held_out, narrow)
    gap = outcome.losses.pop("judged", None)
    if gap is not None:  # of two networks that should be one, on the same few draws
        outcome.losses["masked"] = outcome.losses["removed"] + gap - flow.quick_loss(narrow)


def stored(narrow: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in the type in which it is stored.

    Raises:
        GfpruneError: a weight is not finite; names it.
    """
    cast_model(without_reading(narrow), dtype)
    for name, tensor in narrow.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise GfpruneError(f"tensor {name} is not finite after pruning: {RECOVERY_REMEDIES.not_finite}")
    return narrow
