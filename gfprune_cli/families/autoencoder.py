"""Autoencoders of images."""

from gfprune_cli.families.family import Family, Inputs, Request


def autoencoder(request: Request) -> Inputs:
    height, width = request.area(request.config.sample_size)
    return {"sample": request.zeros(1, request.config.in_channels, height, width)}


FAMILY = Family(
    classes=("AutoencoderKL", "VQModel", "AutoencoderKLFlux2"),
    inputs=autoencoder,
)
