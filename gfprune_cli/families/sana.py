"""Sana."""

from gfprune_cli.families.family import Ends, Family, Inputs, Request, picture


def sana(request: Request) -> Inputs:
    inputs = {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(300, request.config.caption_channels),
        "timestep": request.time(),
    }
    if request.config.guidance_embeds:
        inputs["guidance"] = request.time()
    return inputs


FAMILY = Family(
    classes=("SanaTransformer2DModel",),
    inputs=sana,
    ends=Ends({"proj_out": "in"}, "read"),
    blocks=("SanaTransformerBlock",),
    masked=True,
)
