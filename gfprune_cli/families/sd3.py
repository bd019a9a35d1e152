"""Stable Diffusion 3."""

from gfprune_cli.families.family import APART, Ends, Family, Inputs, Request, picture


def sd3(request: Request) -> Inputs:
    return {
        "hidden_states": picture(request),
        "encoder_hidden_states": request.text(77 + 256, request.config.joint_attention_dim),
        "pooled_projections": request.zeros(1, request.config.pooled_projection_dim),
        "timestep": request.time(),
    }


FAMILY = Family(
    classes=("SD3Transformer2DModel",),
    inputs=sd3,
    ends=Ends({"context_embedder": APART, "time_text_embed": APART, "proj_out": "in"}),
    pairs={"JointTransformerBlock": ("encoder_hidden_states", "hidden_states")},
)
