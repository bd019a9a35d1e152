"""LTX-Video."""

from gfprune_cli.families.family import Ends, Family, Inputs, Request


def ltx(request: Request) -> Inputs:
    """161 frames of 512 x 704 pixels."""
    config = request.config
    height, width = request.area(16, 22)
    frames = request.sizes.frames or 21
    text = request.text(128, config.caption_channels)
    return {
        "hidden_states": request.zeros(1, frames * height * width, config.in_channels),
        "encoder_hidden_states": text,
        "timestep": request.time(),
        "encoder_attention_mask": request.zeros(1, text.shape[1]) + 1,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


FAMILY = Family(
    classes=("LTXVideoTransformer3DModel",),
    inputs=ltx,
    ends=Ends({"proj_in": "out", "proj_out": "in"}, "read"),
    blocks=("LTXVideoTransformerBlock",),
)
