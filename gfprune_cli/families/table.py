"""The architectures of which gfprune knows something beforehand: one file and one row each."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gfprune_cli.families import (
    autoencoder,
    cogvideox,
    controlnet,
    dit,
    flux,
    ltx,
    pixart,
    qwen_image,
    sana,
    sd3,
    stable_audio,
    t2i_adapter,
    unet,
    wan,
)  # fmt: skip
from gfprune_cli.families.family import Family

FAMILIES: list[Family] = [
    module.FAMILY
    for module in (
        unet, autoencoder, dit, pixart, sd3, flux, sana, cogvideox, wan, ltx, stable_audio, qwen_image,
        controlnet, t2i_adapter,
    )
] + list(controlnet.OF_TRANSFORMERS)  # fmt: skip


def family_of(model: Any) -> Family | None:
    """The family of a network, dense or pruned; None for a class that has no row."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def has_known_inputs(model: nn.Module) -> bool:
    """Whether the inputs of a network follow from its configuration."""
    family = family_of(model)
    return family is not None and family.inputs is not None


def added_arguments(model: Any) -> tuple[str, ...]:
    """The arguments of a denoiser that take what this network returns; none of a network that predicts."""
    family = family_of(model)
    return () if family is None else family.adds


def is_known_class(name: str) -> bool:
    """Whether the inputs of a class of diffusers follow from its configuration."""
    return any(name in family.classes and family.inputs is not None for family in FAMILIES)


def pairs() -> Mapping[str, tuple[str, ...]]:
    """Classes of residual blocks with several streams -> the arguments that are these, as returned."""
    return {name: streams for family in FAMILIES for name, streams in family.pairs.items()}


def carriers() -> set[str]:
    """Classes of residual blocks whose streams are known."""
    return {name for family in FAMILIES for name in (*family.blocks, *family.pairs)}
