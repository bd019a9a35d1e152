"""One prune run: from a dense network in memory to a narrow one."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.reader import build_meta, check_weights, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import as_json, installed_tools
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import stored_dtype, stored_share
from gfprune_cli.data.calibration import ImageRequest, PipelineOptions, training_process
from gfprune_cli.data.stored import StoredImages
from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import Network, losses_of_draws
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.table import has_known_inputs
from gfprune_cli.flow.criteria import Evidence
from gfprune_cli.flow.loop import SCORE_CHUNK, checked_scores, scoring_losses
from gfprune_cli.flow.mask import MaskedModel, Masks
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.inputs.receiver import receiving
from gfprune_cli.outputs.state import run_digest
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.pruning.fold import Folder, folding_attempt
from gfprune_cli.pruning.memory import FLOAT, MemoryPlan, Pass, one_pass
from gfprune_cli.pruning.phases import FOLDING, LOSSES, SCORING, alternatives, phases_of
from gfprune_cli.pruning.plan import Plan, folded_plan
from gfprune_cli.pruning.probes import Probes
from gfprune_cli.pruning.result import Folding
from gfprune_cli.pruning.verify import small_share
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recovery.recover import channels_last
from gfprune_cli.runtime.device import default_precision, is_elsewhere, offload
from gfprune_cli.runtime.half import half_name, kept_in
from gfprune_cli.runtime.memory import available, keep_nothing_back
from gfprune_cli.runtime.processes import Processes

REPORT_SHARE = 4  # one image in so many is kept for the reported losses
LOSS_DRAWS = 128  # noisy samples behind each reported loss


def as_loaded(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, laid out as a run starts with it: training lays it out channels last."""
    if device.type == "cuda":
        network = channels_last(network)
    else:
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
    return nn.Module.to(network, device)


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
        processes: Processes | None = None,
    ) -> None:
        self.recipe, self.source, self.plan = recipe, source, plan
        self.device, self.progress = device, progress
        self.processes = processes or Processes(None, device)  # that share the work
        self.asked_to_offload = offload_teacher and device.type != "cpu"
        self.new_folder: Callable[[], Path] | None = None  # for weights that main memory has no room for
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
        self.request = ImageRequest(
            recipe.data, recipe.images, recipe.sample_steps, recipe.seed, options, self.processes
        )
        network: Any = build_meta(plan.component)
        self.request.check(plan.component, network.config, scheduler)
        check_weights(plan.component, network)
        self.steps = recipe.recover if recipe.removes else 0  # folding alone leaves nothing to mend
        self.folding: Folding | None = None
        self.given = plan  # that of the network as it was given; `plan` is for what it was folded to
        self.precision = recipe.precision or default_precision(device)
        # all take the same way, the one that there is memory for everywhere
        self.free = self.processes.least(available(device))
        self.receiver = receiving(plan.component)
        if self.receiver is not None:
            self.free -= FLOAT * sum(math.prod(info.shape) for info in self.receiver.tensors.values())
        known = example_inputs(network) if has_known_inputs(network) else None
        self.plan_memory(Pass() if known is None else one_pass(network, known))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file."""
        return sha256_of_weights(self.plan.component)

    def identity(self, number: int = 0) -> dict[str, Any]:
        """What a resumed run must share with the one that left the state.

        Args:
            number: of the network, where a run makes several.
        """
        # the hashes below say what these stood for
        addresses = ("model", "revision", "variant", "config_from", "times")
        recipe = self.recipe.up_to(number).document()
        settings = {key: value for key, value in recipe.items() if key not in addresses}
        return {
            **settings,
            "weights": self.hashes,
            "commit": self.source.commit,
            "device": self.device.type,
            **({"processes": self.processes.count} if self.processes.count > 1 else {}),
            "config": as_json(self.plan.component.config),
            "scheduler": as_json(dict(self.scheduler.config)),
            **self.given_times(),
            "tools": installed_tools(),
        }

    def given_times(self) -> dict[str, Any]:
        """The table of `--times`: it decides widths. One that is measured does so as well, but never twice in
        the same way: its run says what it found."""
        given = self.plan.time if self.recipe.times is not None else None
        return {} if given is None else {"times": run_digest(given.table.document())}

    def plan_memory(self, one: Pass) -> None:
        """Decide how many samples go through a network at once in each phase, and what gives where memory is
        short: the place of the dense network first.

        Args:
            one: what one sample takes in the dense network.

        Raises:
            GfpruneError: the run does not fit.
        """
        weights = self.plan.cost.params({}) * FLOAT
        recipe, narrow = self.recipe, small_share(self.plan.groups, self.plan.cost)
        stored = stored_share(self.plan.component)
        folds = self.plan.fold > 0
        forms = partial(phases_of, recipe, one, narrow=narrow, folds=folds)
        advice = alternatives(recipe, one, narrow, stored, folds)
        empty = MemoryPlan(self.device, self.free, weights, (), advice)
        here, there = (empty.of(forms(offload=offload)) for offload in (False, True))
        self.offload_teacher = self.asked_to_offload or not here.fits(here.phases)
        self.memory = there if self.offload_teacher else here
        if stored < 1 and not self.memory.fits(self.memory.phases):
            half = half_name(stored_dtype(self.plan.component))
            self.memory = replace(empty.of(forms(offload=True, stored=stored)), half=half)
        self.memory.check()
        if self.device.type == "cpu" and not self.memory.plenty:  # what is let go is wanted again
            keep_nothing_back()

    def prepared(self) -> tuple[nn.Module, Draws, Draws]:
        """The dense network, draws for scoring and training, and draws for the reported losses."""
        self.progress(Event("load", text="reading weights"))
        dense = self.load()
        self.progress(Event("calibrate", text="preparing calibration images"))
        return dense, *self.draws(dense)

    def fold(self, dense: nn.Module, draws: Draws, held_out: Draws) -> nn.Module:
        """The dense network with layers that see few inputs as two, where it is to be folded; the plan is
        then for that."""
        if not self.plan.fold:
            return dense
        shape = tuple(draws.images.shape[1:])
        probes = Probes(self.process, self.conditions, shape, self.device, self.recipe.seed)
        dtype = stored_dtype(self.plan.component)
        at_once = self.memory.at_once(FOLDING)
        folder = Folder(dense, probes, self.plan.fold, dtype, self.progress, at_once)
        asked = self.recipe.fold is not None or not self.recipe.removes
        found = folding_attempt(folder, self.process, held_out, asked=asked)
        if found is None:
            return dense
        network, self.folding = found
        self.plan = folded_plan(self.plan, network, self.recipe, self.progress)
        return self.as_planned(as_loaded(network, self.device))

    def load(self) -> nn.Module:
        """The dense network on the run's device, frozen."""
        in_half = self.memory.half is not None
        return as_loaded(load_model(self.plan.component, in_half=in_half).requires_grad_(False), self.device)

    def twin(self, dense: nn.Module) -> nn.Module:
        """A network to change, beside the dense one; where that goes elsewhere, it takes over the weights."""
        if not self.offload_teacher or is_elsewhere(dense):
            return copy.deepcopy(dense)
        own = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in dense.parameters()}
        twin = copy.deepcopy(dense, own)
        self.put_elsewhere(dense)
        return twin

    def put_elsewhere(self, dense: nn.Module) -> None:
        """Make room where the plan needs it: the dense network goes to main memory, from there to a disk."""
        if not self.offload_teacher or is_elsewhere(dense):
            return
        folder = None
        if self.device.type == "cpu" and self.new_folder is not None:
            notice(self.progress, "there is memory for one copy of the weights: the dense ones stay on disk")
            folder = self.new_folder()
        offload(dense, self.device, folder)

    def draws(self, dense: nn.Module) -> tuple[Draws, Draws]:
        """Draws for scoring and training, and for the reported losses; from different images."""
        images, conditions = self.images(dense)
        self.split = split = len(images) - max(1, len(images) // REPORT_SHARE)
        every = Draws(images, self.process.steps, self.recipe.seed, conditions, self.device)
        return every.split(split)

    def scored(self) -> tuple[MaskedModel, Draws, Masks]:
        """The dense network under full masks, draws to measure it on, and Taylor scores: what a sensitivity
        probe starts from."""
        dense = self.load()
        draws, held_out = self.draws(dense)
        masked = MaskedModel(dense, self.plan.groups)
        count, piece = self.recipe.draws, self.memory.at_once(SCORING)
        losses = scoring_losses(
            masked, self.process, draws, 1, count, SCORE_CHUNK, self.progress, piece=piece
        )
        evidence = Evidence(masked, losses, self.recipe.seed)
        scores = checked_scores("taylor", evidence, self.process, draws, 1, count, piece)
        return masked, held_out, scores

    def images(self, dense: nn.Module) -> tuple[torch.Tensor | StoredImages, Condition]:
        """Calibration images [N, ...] as the network sees them, and their conditions."""
        see_inputs = partial(self.see_inputs, dense)
        found = self.request.answer(
            dense, self.plan.component, self.scheduler, self.hashes, self.progress, see_inputs
        )
        self.data_fingerprint = found.fingerprint
        self.process, self.conditions, self.found = found.process, found.conditions, found
        return found.images, found.conditions

    def see_inputs(
        self, dense: nn.Module, inputs: Mapping[str, Any], beside: Mapping[str, Any] | None
    ) -> None:
        """Plan anew with what the network is really given, before anything is drawn: a pipeline may pass it
        more than its configuration says.

        Args:
            beside: what the denoiser is given that takes what it returns, if there is one.
        """
        one = one_pass(build_meta(self.plan.component), inputs)
        if self.receiver is not None and beside is not None:
            one = one.then(one_pass(build_meta(self.receiver), beside))
        self.plan_memory(one)
        self.as_planned(dense)

    def as_planned(self, network: nn.Module) -> nn.Module:
        """The network, its weights in half precision where the plan keeps them so."""
        return kept_in(network, self.memory.half)

    def loss(self, draws: Draws, network: nn.Module | MaskedModel, count: int = LOSS_DRAWS) -> float:
        """Denoising loss of a network over the fixed report draws."""
        return float(self.losses(draws, network, count).mean())

    @torch.no_grad()
    def losses(self, draws: Draws, network: nn.Module | MaskedModel, count: int = LOSS_DRAWS) -> torch.Tensor:
        """[count] float64 denoising losses of a network, behind its masks if it has some."""
        called: Network
        if isinstance(network, MaskedModel):
            called = partial(network.forward, network.passing())
        else:
            called = partial(call, network)
        at_once = self.memory.at_once(LOSSES)
        return losses_of_draws(called, self.process, draws, count, self.progress, at_once, self.processes)
