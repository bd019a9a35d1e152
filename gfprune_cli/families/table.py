"""The architectures that gfprune knows without their pipelines: one file and one row each."""

from typing import Any

from torch import nn

from gfprune_cli.families import (
    autoencoder,
    cogvideox,
    dit,
    flux,
    ltx,
    pixart,
    sana,
    sd3,
    stable_audio,
    unet,
    wan,
)  # fmt: skip
from gfprune_cli.families.family import Family

FAMILIES: list[Family] = [
    module.FAMILY
    for module in (
        unet, autoencoder, dit, pixart, sd3, flux, sana, cogvideox, wan, ltx, stable_audio
    )
]  # fmt: skip


def family_of(model: Any) -> Family | None:
    """The family of a network, dense or pruned; None for a class that gfprune knows nothing of."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def has_known_inputs(model: nn.Module) -> bool:
    """Whether the inputs of a network follow from its configuration."""
    return family_of(model) is not None


def is_known_class(name: str) -> bool:
    """Whether the inputs of a class of diffusers follow from its configuration."""
    return any(name in family.classes for family in FAMILIES)


def carriers() -> set[str]:
    """Classes of residual blocks whose streams are known."""
    return {name for family in FAMILIES for name in (*family.blocks, *family.pairs)}
