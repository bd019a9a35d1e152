"""Autoencoders of images."""

from gfprune_cli.families.family import Family, picture

FAMILY = Family(
    classes=("AutoencoderKL", "VQModel", "AutoencoderKLFlux2"),
    inputs=lambda request: {"sample": picture(request)},
)
