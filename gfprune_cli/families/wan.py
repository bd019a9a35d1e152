"""Wan."""

from gfprune_cli.families.family import Ends, Family, Inputs, Request


def wan(request: Request) -> Inputs:
    """81 frames of 480 x 832 pixels; an image condition where the configuration has one."""
    config = request.config
    longest = config.rope_max_seq_len
    sizes = (request.sizes.frames or 21, *request.area(60, 104))
    sizes = tuple(min(size, longest * patch) for size, patch in zip(sizes, config.patch_size, strict=True))
    # with an image the class itself takes the last 512 tokens for the text
    text = (
        request.text(512, config.text_dim)
        if config.image_dim is None
        else request.zeros(1, 512, config.text_dim)
    )
    inputs = {
        "hidden_states": request.zeros(1, config.in_channels, *sizes),
        "encoder_hidden_states": text,
        "timestep": request.index(1) + 1,
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = request.zeros(1, 257, config.image_dim)
    return inputs


FAMILY = Family(
    classes=("WanTransformer3DModel",),
    inputs=wan,
    ends=Ends({"patch_embedding": "out", "proj_out": "in"}),
    blocks=("WanTransformerBlock",),
)
