"""ControlNets of U-Nets: a copy of its encoder, which adds to what the encoder hands on."""

from gfprune_cli.families.family import Family, Inputs, Request
from gfprune_cli.families.unet import conditioning_inputs

EDGE = 64  # of latents: its configuration does not say how large they are


def controlnet(request: Request) -> Inputs:
    config = request.config
    height, width = request.area(EDGE)
    scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    inputs = {
        "sample": request.zeros(1, config.in_channels, height, width),
        "timestep": request.time(),
        "controlnet_cond": request.zeros(1, config.conditioning_channels, scale * height, scale * width),
    }
    return inputs | conditioning_inputs(request, height, width)


FAMILY = Family(
    classes=("ControlNetModel",),
    inputs=controlnet,
    adds=("down_block_additional_residuals", "mid_block_additional_residual"),
)
