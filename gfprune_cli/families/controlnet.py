"""ControlNets: of a U-Net a copy of its encoder, which adds to what the encoder hands on; of a transformer a
few of its blocks, which add to the stream after each of its own."""

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

OF_TRANSFORMERS = (
    Family(classes=("SD3ControlNetModel",), inputs=None, adds=("block_controlnet_hidden_states",)),
    Family(classes=("QwenImageControlNetModel",), inputs=None, adds=("controlnet_block_samples",)),
    Family(
        classes=("FluxControlNetModel",),
        inputs=None,
        adds=("controlnet_block_samples", "controlnet_single_block_samples"),
        time_factor=1e-3,
    ),
)
