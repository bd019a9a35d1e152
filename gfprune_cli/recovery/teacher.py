"""The dense model that a pruned checkpoint learns from: found, checked, loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.reader import build_meta, inspect, sha256_of_weights
from gfprune_cli.checkpoint.record import Record, as_json
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import Source, resolve
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError, named
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.structure.blocks import block_groups, depth_of
from gfprune_cli.structure.correspondence import kept_units
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup
from gfprune_cli.structure.native import TEXT_TO_IMAGE, narrows_streams
from gfprune_cli.structure.removal import attention_scales, cuts_of

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose outputs can be compared
# what pruning may change in a configuration: widths and depths, and what follows from them
WIDTHS = {
    *("block_out_channels", "norm_num_groups", "attn_norm_num_groups", "attention_head_dim"),
    *("num_layers", "num_single_layers", "ffn_dim"),
}
DEPTHS = {  # of the U-Nets that lose blocks in the native layout
    *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    "mid_block_type",
}
OWN = {"gfprune", "auto_map"}
NOISE = (  # what decides, in a scheduler's configuration, what the outputs mean
    *("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("trained_betas", "rescale_betas_zero_snr", "sigma_min", "sigma_max"),
)


@dataclass(frozen=True)
class Teacher:
    """A dense checkpoint that fits the student: where it is, and the hashes of its weights."""

    source: Source
    component: Component
    hashes: dict[str, str]


def find_teacher(
    student: Component, record: Record, recipe: FinetuneRecipe, *, offline: bool, progress: Progress
) -> Teacher:
    """The teacher that the user named, or the one that the student was pruned from.

    Raises:
        UsageError: the one named does not fit; GfpruneError: the recorded one is gone or has changed.
    """
    origin = record.source
    label = recipe.teacher or record.dense_label()
    revision = recipe.teacher_revision if recipe.teacher else (recipe.teacher_revision or origin.commit)
    variant = recipe.variant or (None if recipe.teacher else record.variant)
    try:
        config = None if recipe.teacher else record.config_from
        with named(model="teacher", revision="teacher_revision"):
            source = resolve(
                label,
                revision=revision,
                variant=variant,
                config_from=config,
                offline=offline,
                progress=progress,
            )
    except Interrupted:
        raise
    except GfpruneError as error:
        if recipe.teacher is not None or (isinstance(error, UsageError) and revision):
            raise
        raise GfpruneError(
            f"the dense model this checkpoint was pruned from, {quoted(label)}, cannot be read "
            f"({error}): name it with --teacher"
        ) from error
    pipeline = (source.folder / "model_index.json").exists()
    component = inspect(
        source, component=student.name if student.name and pipeline else None, variant=variant
    )
    check_fit(student, component, label)
    progress(Event("load", text=f"hashing {source.folder}"))
    hashes = sha256_of_weights(component)
    if sorted(hashes.values()) != sorted(origin.weights.values()):
        if recipe.teacher is None:
            raise GfpruneError(
                f"the weights of {quoted(label)} have changed since this checkpoint was pruned from them: "
                "restore them, or accept them as they are with --teacher"
            )
        notice(progress, f"--teacher {label}: not the weights that this checkpoint was pruned from")
    return Teacher(source, component, hashes)


def check_fit(student: Component, teacher: Component, label: str) -> None:
    """Refuse a teacher whose outputs mean something else.

    Raises:
        UsageError: another class, resolution, structure or noise.
    """
    if stock_name(teacher.class_name) != stock_name(student.class_name):
        raise UsageError(
            f"teacher {quoted(label)} is a {teacher.class_name}, and the student was pruned from a "
            f"{stock_name(student.class_name)}: name the model it was pruned from"
        )
    mine, theirs = (as_json(dict(build_meta(part).config)) for part in (student, teacher))  # type: ignore[arg-type]
    free = WIDTHS | OWN | (DEPTHS if student.class_name == TEXT_TO_IMAGE else set())
    for key in sorted((mine.keys() | theirs.keys()) - free):
        if not key.startswith("_") and mine.get(key) != theirs.get(key):
            raise UsageError(
                f"teacher {quoted(label)} has {key} {theirs.get(key)} and the student {mine.get(key)}: "
                "name the model it was pruned from"
            )
    for key in NOISE:
        values = [getattr(load_scheduler(part), "config", {}).get(key) for part in (student, teacher)]
        if values[0] != values[1]:
            raise UsageError(
                f"teacher {quoted(label)} was trained with {key} {values[1]}, the student with {values[0]}: "
                "name the model it was pruned from"
            )


@dataclass(frozen=True)
class Correspondence:
    """How the layers of a pruned network lie in the dense one.

    Args:
        positions: layer of the student -> output positions of the teacher's layer that are left, ascending.
        names: layer of the student -> the teacher's layer, where blocks that went before moved it.
        scales: layer of the student -> what removal multiplied its outputs with, where that is not 1.
        readers: as `positions`, of layers that lost inputs alone: all outputs of the teacher's.
    """

    positions: dict[str, torch.Tensor]
    names: dict[str, str]
    scales: dict[str, float]
    readers: dict[str, torch.Tensor] = field(default_factory=dict)


def paired_layers(
    teacher: nn.Module, record: Record, inputs: Mapping[str, Any] | None = None
) -> Correspondence:
    """Which outputs of the teacher's layers a student still has.

    Args:
        teacher: on any device; only its structure is read.
        inputs: of one forward pass, for a class that gfprune does not know.

    Raises:
        GfpruneError: the record does not describe a pruning of this network.
    """
    settings: Any = record.document.get("recipe") or {}
    layout = settings.get("layout", "")
    stages = narrows_streams(type(teacher).__name__, layout)
    width = bool(settings.get("prune_width")) or stages
    groups, _ = discover(teacher, inputs, width=width, stages=stages)
    if settings.get("blocks"):
        groups += block_groups(teacher, stock=layout == "native")
    if layout == "native":
        groups = tuple(group for group in groups if group.name in record.kept)
    for group in groups:
        kept = record.kept.get(group.name)
        if kept is None or not (kept or group.is_block) or (kept and kept[-1] >= group.channels):
            raise GfpruneError(
                f"gfprune.json keeps no valid channels of {quoted(group.name)}: it belongs to another model"
            )
    return layers_left(teacher, groups, kept_units(groups, record.kept))


def layers_left(
    teacher: nn.Module, groups: tuple[ChannelGroup, ...], alive: Mapping[str, torch.Tensor]
) -> Correspondence:
    """The same by group name -> bool [units] that are left."""
    cuts, depth = cuts_of(teacher, groups, alive), depth_of(teacher, groups, alive)
    scales = {f"{name}.to_q": factor for name, factor in attention_scales(teacher, cuts).items()}
    positions = {name: cut.out for name, cut in cuts.items() if cut.out is not None}
    layers = {name: part for name, part in teacher.named_modules() if isinstance(part, LAYERS)}
    readers = {
        name: torch.arange(layers[name].weight.shape[0])
        for name, cut in cuts.items()
        if cut.out is None and name in layers
    }
    return Correspondence(
        depth.renamed(positions),
        depth.renamed({name: name for name in positions | readers}),
        depth.renamed(scales),
        depth.renamed(readers),
    )
