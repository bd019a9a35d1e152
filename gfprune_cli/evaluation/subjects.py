"""The networks of an evaluation: the model, and the dense one it is compared with."""

import errno
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.layout import is_autoencoder, stock_name
from gfprune_cli.checkpoint.reader import inspect, load_model, sha256_of_weights
from gfprune_cli.checkpoint.record import RECORD, as_json, read_record
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import Source, resolve
from gfprune_cli.data.calibration import image_size, training_process
from gfprune_cli.data.latents import decoder_name
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError, named
from gfprune_cli.progress import Progress
from gfprune_cli.recipes.evaluate import EvalRecipe

MUST_AGREE = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
PLAIN = "UNet2DModel"


class NoReference(Exception):
    """There is nothing to compare with; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to evaluate: `label` as the user named it."""

    label: str
    source: Source
    component: Component
    loaded: dict[torch.device, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file."""
        return sha256_of_weights(self.component)

    @property
    def fold(self) -> dict[str, Any] | None:
        """What the record says of modulation folding; None without, or without a record to read."""
        try:
            record = read_record(self.component.root, self.component.name)
        except GfpruneError as error:
            if failing_disk(error):
                raise
            return None
        found = record.document.get("fold") if record else None
        if not found:
            return None
        kept = ("tolerance", "params", "layer_error", "output_error")
        return {"layers": len(found["layers"]), **{key: found[key] for key in kept}}

    @cached_property
    def scheduler(self) -> Any:
        """The noise scheduler of the checkpoint.

        Raises:
            GfpruneError: there is none.
        """
        scheduler = load_scheduler(self.component)
        if scheduler is None:
            raise GfpruneError(f"{self.component.root} has no scheduler: gfprune cannot sample without one")
        return scheduler

    @cached_property
    def process(self) -> NoisingProcess:
        return training_process(self.component, self.scheduler)

    @property
    def latent(self) -> bool:
        """Whether the network works on latents of a decoder; conditioned ones without a pipeline do."""
        if self.autoencoder:
            return False
        if self.component.pipeline is None:
            return not self.unconditional
        return decoder_name(self.component) is not None

    @property
    def autoencoder(self) -> bool:
        return is_autoencoder(self.component.class_name)

    @property
    def unconditional(self) -> bool:
        """Whether class labels are all that the network is ever given."""
        return stock_name(self.component.class_name) == PLAIN

    def shape(self, config: Any) -> tuple[int, int, int]:
        """(C, H, W) of what an unconditional network denoises."""
        return (config.in_channels, *image_size(self.component, config))

    def load(self, device: torch.device) -> nn.Module:
        """The network, frozen, in float32; read once."""
        if device not in self.loaded:
            network = load_model(self.component).requires_grad_(False)
            self.loaded[device] = nn.Module.to(network, device)
        return self.loaded[device]


def model_of(recipe: EvalRecipe, *, offline: bool, progress: Progress) -> Subject:
    """What `--model` names."""
    source = resolve(
        recipe.model, revision=recipe.revision, variant=recipe.variant, offline=offline, progress=progress
    )
    return Subject(recipe.model, source, inspect(source, component=recipe.component, variant=recipe.variant))


def reference_of(recipe: EvalRecipe, model: Subject, *, offline: bool, progress: Progress) -> Subject:
    """What `--reference` names, or else the dense model that the model's record names.

    Raises:
        NoReference: no flag, and no record that leads to a dense model.
        UsageError: the two networks do not denoise the same thing.
    """
    if recipe.reference is not None:
        with named(model="reference", revision="reference_revision", variant="reference_variant"):
            source = resolve(
                recipe.reference,
                revision=recipe.reference_revision,
                variant=recipe.reference_variant,
                offline=offline,
                progress=progress,
            )
        pipeline = (source.folder / "model_index.json").exists()
        name = model.component.name if pipeline and model.component.name else None
        component = inspect(source, component=name, variant=recipe.reference_variant)
        found = Subject(recipe.reference, source, component)
    else:
        for name in ("reference_revision", "reference_variant"):
            if getattr(recipe, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --reference")
        found = recorded_reference(model, offline=offline, progress=progress)
    for key in MUST_AGREE:
        one, other = model.component.config.get(key), found.component.config.get(key)
        if one != other:
            raise UsageError(
                f"--reference {found.label} has {key} {other} and --model {model.label} {one}: "
                "they cannot be compared"
            )
    return found


def recorded_reference(model: Subject, *, offline: bool, progress: Progress) -> Subject:
    """The dense model that `gfprune.json` says the model was pruned from, if it is still the same.

    Raises:
        NoReference: no record, or the model it names cannot be had or has changed; GfpruneError: the disk
            failed, which says nothing about whether there is a reference.
    """
    root = model.component.root
    try:
        record = read_record(root, model.component.name)
        if record is None:
            raise NoReference(f"{model.label} has no {RECORD} that names a dense model it was pruned from")
        with named(teacher="reference", model="reference"):
            source = record.dense_source(offline=offline, progress=progress)
        component = inspect(source, component=model.component.name or None, variant=record.variant)
        found = Subject(record.source.label, source, component)
    except Interrupted:
        raise
    except GfpruneError as error:
        if failing_disk(error):
            raise
        raise NoReference(str(error)) from error
    if source.kind != record.source.kind or found.hashes != record.source.weights:
        raise NoReference(f"the weights of {found.label} are not those that {root / RECORD} names")
    return found


def failing_disk(error: BaseException | None) -> bool:
    """Whether an error comes of a file that is there and cannot be read now."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):
            return True
        error = error.__cause__ or error.__context__
    return False


def same_noise(one: Subject, other: Subject) -> bool:
    """Whether two checkpoints come with the same noise scheduler."""
    first, second = (
        {key: value for key, value in as_json(dict(part.scheduler.config)).items() if key[0] != "_"}
        for part in (one, other)
    )
    return bool(first == second)
