"""One finetune run: from a pruned network to a better one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.card import Picture
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta, cast_model, check_weights, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import Record, as_json, installed_tools
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.writer import stored_dtype
from gfprune_cli.data.calibration import ImageRequest, PipelineOptions, training_process
from gfprune_cli.data.sample_rows import Samples, dense_samples
from gfprune_cli.diffusion.conditions import call
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.loss import REPORT_DRAWS, denoising_loss
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.receiver import receiving
from gfprune_cli.inputs.unknown_classes import pipeline_inputs
from gfprune_cli.outputs.state import StateFolder, run_digest
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.by_block import largest_part
from gfprune_cli.recovery.logs import Watch
from gfprune_cli.recovery.lora import adapted_layers, adapter_size, add_adapters, merge_adapters
from gfprune_cli.recovery.losses import FeaturePair
from gfprune_cli.recovery.memory import held_bytes
from gfprune_cli.recovery.optimizers import soap_numbers
from gfprune_cli.recovery.pieces import first_not_finite
from gfprune_cli.recovery.recover import channels_last, recover
from gfprune_cli.recovery.sharding import agreed, gathered, load_sharded, round_weights, stand_in
from gfprune_cli.recovery.teacher import Teacher, paired_layers
from gfprune_cli.runtime.device import default_precision, offload
from gfprune_cli.runtime.processes import Processes

DRAWN_IMAGES = 512
REPORT_SHARE = 8  # one image in so many is kept aside for the reported losses ...
REPORT_IMAGES = 256  # ... and at most so many
ALL_IMAGES = 10**7


@dataclass
class FinetuneJob:
    """The inputs of one run. To make one is to take every check that reads no weight of the student.

    Args:
        component: the pruned network on disk.
        record: its `gfprune.json`.
        offload_teacher: keep the teacher in main memory while another device trains.
    """

    recipe: FinetuneRecipe
    component: Component
    record: Record
    teacher: Teacher
    processes: Processes
    progress: Progress
    offload_teacher: bool = False
    fingerprint: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        scheduler = load_scheduler(self.component)
        if scheduler is None:  # not `or`: the length of some cannot be told
            scheduler = load_scheduler(self.teacher.component)
        if scheduler is None:
            raise GfpruneError(f"{self.component.root} has no scheduler: fetch or prune the checkpoint again")
        self.scheduler: Any = scheduler
        self.process: NoisingProcess = training_process(self.teacher.component, scheduler)
        teacher: Any = build_meta(self.teacher.component)
        student: Any = build_meta(self.component)
        self.request.check(self.teacher.component, teacher.config, scheduler)
        check_weights(self.teacher.component, teacher)
        check_weights(self.component, student)
        if self.recipe.checkpointing and not student._supports_gradient_checkpointing:
            name = self.component.class_name
            raise UsageError(f"--checkpointing: a {name} cannot recompute its activations: drop the flag")
        rank, total = self.recipe.lora, student.num_parameters()
        training = largest_part(student) if self.recipe.by_block else total
        training = adapter_size(student, adapted_layers(student, self.record), rank) if rank else training
        whole = training == total
        taker = receiving(self.teacher.component)
        receiver: Any = None if taker is None else build_meta(taker)
        self.settle = partial(
            self.recipe.settled,
            training,
            left=total / teacher.num_parameters(),
            sharded=self.sharded,
            trained=self.record.steps,
        )
        self.settled = self.settle()  # the rate will be that of its losses
        self.held = held_bytes(
            self.settled,
            student=total,
            training=training,
            moments=soap_numbers(student) if whole and self.settled.optimizer == "soap" else None,
            teacher=0
            if self.offload_teacher and self.processes.device.type != "cpu"
            else teacher.num_parameters(),
            denoiser=0 if receiver is None else receiver.num_parameters(),
        )
        if self.sharded:
            self.held = {kind: size / self.processes.count for kind, size in self.held.items()}
        self.device = self.processes.device
        self.precision = self.recipe.precision or default_precision(self.device)
        wanted = self.recipe.channels_last
        able = self.device.type in ("cuda", "cpu") and not self.sharded
        self.channels_last = able if wanted is None else wanted

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file of the student."""
        return sha256_of_weights(self.component)

    @property
    def request(self) -> ImageRequest:
        """The images to train on: of the user's data, or drawn from the teacher."""
        recipe = self.recipe
        drawn = recipe.data == "self"
        return ImageRequest(
            None if drawn else recipe.data,
            recipe.images or (DRAWN_IMAGES if drawn else ALL_IMAGES),
            recipe.sample_steps,
            recipe.seed,
            PipelineOptions.of(recipe),
        )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that left the state."""
        addresses = ("model", "revision", "variant", "teacher", "teacher_revision")  # the hashes tell
        settings = {key: value for key, value in self.recipe.document().items() if key not in addresses}
        inputs = {"config": self.component.config, "scheduler": dict(self.scheduler.config)}
        return {
            "command": "finetune",
            **settings,
            "weights": self.hashes,
            "teacher weights": self.teacher.hashes,
            "resolved precision": self.precision,
            "device": self.device.type,
            **{name: as_json(value) for name, value in inputs.items()},
            "tools": installed_tools(),
        }

    def execute(
        self,
        state: StateFolder,
        *,
        save_every: int,
        sample_every: int,
        open_watch: Callable[[int], Watch] | None,
    ) -> tuple[nn.Module | None, dict[str, float], Picture | None]:
        """The trained network (averaged weights, in the type it is stored in), the losses, and samples.

        Where networks are in pieces, the network is the first process's alone.
        """
        teacher = self.dense()
        draws, held_out = self.draws(teacher)
        if self.sharded:
            del teacher  # before it is read once more
            teacher = load_sharded(self.teacher.component, self.processes)
        state.identity["data contents"] = self.fingerprint
        state.identity["sharding"] = self.sharded
        losses = {"teacher": self.loss(held_out, teacher)}
        samples = self.samples(teacher) if self.processes.main else None
        if self.recipe.teacher_precision == "bf16":
            teacher = self.in_bf16(teacher)
        if self.offload_teacher and self.device.type != "cpu":
            offload(teacher, self.device)
        student = (
            load_sharded(self.component, self.processes)
            if self.sharded
            else self.place(load_model(self.component))
        )
        losses["before"] = self.loss(held_out, student)
        if losses["teacher"]:
            self.settled = self.settle(excess=losses["before"] / losses["teacher"] - 1)
        adapters = self.adapters(student) if self.recipe.lora else None
        recover(
            student, teacher, self.process, draws, self.settled,
            processes=self.processes, precision=self.precision, state=state, progress=self.progress,
            save_every=save_every, sample_every=sample_every, samples=samples, open_watch=open_watch,
            pair=self.features(student, teacher),
        )  # fmt: skip
        if adapters is not None:
            student = merge_adapters(adapters)
        round_weights(student, stored_dtype(self.component))
        if (name := first_not_finite(student.state_dict(), self.processes)) is not None:
            raise GfpruneError(f"tensor {name} is not finite after training: lower --learning-rate")
        losses["after"] = self.loss(held_out, student)
        shown = None
        if samples is not None:
            other = sorted(self.teacher.hashes.values()) != sorted(self.record.source.weights.values())
            shown = samples.beside(student, self.poll, self.progress, of_teacher=other)
        whole = gathered(student, self.component, self.processes) if self.sharded else student
        return None if whole is None else cast_model(whole, stored_dtype(self.component)), losses, shown

    @property
    def sharded(self) -> bool:
        """Whether the processes hold the networks in pieces."""
        return self.processes.sharded

    def dense(self) -> nn.Module:
        """The dense network, whole, to draw with; with networks in pieces the first process's alone."""
        if self.sharded and not self.processes.main:
            return stand_in(self.teacher.component, self.device)
        return self.place(load_model(self.teacher.component))

    def in_bf16(self, teacher: nn.Module) -> nn.Module:
        """The teacher in half of the memory; pieces keep the type that they were made in."""
        if self.sharded:
            return load_sharded(self.teacher.component, self.processes, torch.bfloat16)
        return cast_model(teacher, torch.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        """A network on the run's device, frozen, in float32."""
        model = nn.Module.to(model, self.device).requires_grad_(False)
        return channels_last(model) if self.channels_last else model

    def draws(self, teacher: nn.Module) -> tuple[Draws, Draws]:
        """Draws for training, and for the reported losses; from different images."""
        recipe = self.recipe
        with self.processes.main_first():
            found = self.request.answer(
                teacher, self.teacher.component, self.scheduler, self.teacher.hashes, self.progress
            )
        self.fingerprint = found.fingerprint
        self.process, self.found = found.process, found
        images = found.images
        self.split = split = len(images) - min(REPORT_IMAGES, max(1, len(images) // REPORT_SHARE))
        every = Draws(images, self.process.steps, recipe.seed, found.conditions, self.device)
        return every.split(split)

    def adapters(self, student: Any) -> Any:
        """Adapters on the student's layers, of which a notice says how many numbers they train."""
        layers = adapted_layers(student, self.record)
        total = student.num_parameters()
        found = add_adapters(student, layers, self.recipe.lora or 0, self.recipe.seed)
        count = student.num_parameters(only_trainable=True)
        what = f"adapters of rank {self.recipe.lora} on {len(layers)} layers"
        notice(self.progress, f"{what}: {count:,} parameters train, {total:,} are frozen")
        return found

    def features(self, student: nn.Module, teacher: nn.Module) -> FeaturePair | None:
        """The layers of both that can be compared; None if the recipe compares none.

        Raises:
            GfpruneError: there are none, and the recipe asks for them.
        """
        if not (self.recipe.feature_weight or self.recipe.by_block):
            return None
        try:
            inputs = pipeline_inputs(teacher, self.teacher.component, self.progress)
            whole = build_meta(self.teacher.component) if self.sharded else teacher  # its structure is read
            return FeaturePair(student, teacher, paired_layers(whole, self.record, inputs))
        except GfpruneError as error:
            if self.recipe.features is not None or self.recipe.by_block:
                raise
            notice(self.progress, f"features are not compared: {error}")
            return None

    def samples(self, teacher: nn.Module) -> Samples | None:
        """The dense row of grids and model card; None where none can be drawn."""
        if self.sharded:
            notice(self.progress, "no samples are shown: the networks are in pieces")
            return None
        unseen = range(self.split, len(self.found.images))
        return dense_samples(
            teacher, self.component, self.scheduler, self.request, self.found, unseen,
            self.poll, self.progress,
        )  # fmt: skip

    def poll(self) -> None:
        """Asked before every pass of a sample: a signal may arrive within one."""
        self.progress(Event("pass"))

    def loss(self, draws: Draws, model: nn.Module) -> float:
        return denoising_loss(
            partial(call, model),
            self.process,
            draws,
            REPORT_DRAWS,
            agreed(self.progress, self.processes) if self.sharded else self.progress,
        )

    def make_record(self, losses: dict[str, float]) -> dict[str, Any]:
        """The checkpoint's record, with this run appended."""
        entry = {
            "recipe": self.recipe.document(),
            "resolved": {
                "optimizer": self.settled.optimizer,
                "learning_rate": self.settled.learning_rate,
                "denoise": self.settled.denoise_weight,
                "precision": self.precision,
                "device": self.device.type,
                "channels_last": self.channels_last,
                "processes": self.processes.count,
                **({"sharded": True} if self.sharded else {}),
            },
            "student": {"weights": self.hashes},
            "teacher": self.teacher.source.origin(self.teacher.hashes),
            "data": self.fingerprint,
            "loss": losses,
            "run": run_digest(self.identity()),
            "tools": installed_tools(),
        }
        earlier = self.record.document.get("finetune")
        return {**self.record.document, "finetune": [*(earlier if isinstance(earlier, list) else []), entry]}


def default_output(recipe: FinetuneRecipe) -> Path:
    """A name derived from the model."""
    return Path(f"{Path(recipe.model).name or 'model'}-finetuned")
