"""PixArt-alpha and PixArt-sigma."""

from gfprune_cli.families.family import Ends, Family, Inputs, Request, picture


def pixart(request: Request) -> Inputs:
    model, config = request.model, request.config
    tokens = 300 if config.sample_size >= 128 and not model.use_additional_conditions else 120
    sized = model.use_additional_conditions
    added = {
        "resolution": request.zeros(1, 2) if sized else None,
        "aspect_ratio": request.zeros(1, 1) if sized else None,
    }
    return {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": request.time(),
        "added_cond_kwargs": added,
    }


FAMILY = Family(
    classes=("PixArtTransformer2DModel",),
    inputs=pixart,
    ends=Ends({"proj_out": "in"}, "read"),
    blocks=("BasicTransformerBlock",),
    masked=True,
)
