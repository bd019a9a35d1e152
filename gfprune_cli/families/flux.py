"""FLUX.1."""

from gfprune_cli.families.family import APART, Ends, Family, Inputs, Request


def flux(request: Request) -> Inputs:
    """128 x 128 latents, packed two by two."""
    config = request.config
    height, width = request.area(128)
    tokens = (height // 2) * (width // 2)
    text = request.text(512, config.joint_attention_dim)
    inputs = {
        "hidden_states": request.zeros(1, tokens, config.in_channels),
        "encoder_hidden_states": text,
        "pooled_projections": request.zeros(1, config.pooled_projection_dim),
        "timestep": request.time(),
        "img_ids": request.zeros(tokens, 3),
        "txt_ids": request.zeros(text.shape[1], 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = request.time()
    return inputs


FAMILY = Family(
    classes=("FluxTransformer2DModel",),
    inputs=flux,
    ends=Ends(
        {"x_embedder": "out", "context_embedder": "out", "time_text_embed": APART, "proj_out": "in"}, "joined"
    ),
    pairs={
        "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
        "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    },
    time_factor=1e-3,
)
