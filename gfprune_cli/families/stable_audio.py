"""Stable Audio."""

from gfprune_cli.families.family import APART, Ends, Family, Inputs, Request


def stable_audio(request: Request) -> Inputs:
    """Text tokens, and one for each end of the clip."""
    config = request.config
    length = request.sizes.width or config.sample_size
    angles = request.zeros(length + 1, config.attention_head_dim // 2)
    return {
        "hidden_states": request.zeros(1, config.in_channels, length),
        "timestep": request.time(),
        "encoder_hidden_states": request.text(130, config.cross_attention_input_dim),
        "global_hidden_states": request.zeros(1, 1, config.global_states_input_dim),
        "rotary_embedding": (angles + 1, angles),
    }


FAMILY = Family(
    classes=("StableAudioDiTModel",),
    inputs=stable_audio,
    ends=Ends(
        {
            "time_proj": APART,
            "timestep_proj": "out",
            "global_proj": "out",
            "cross_attention_proj": APART,
            "preprocess_conv": APART,
            "proj_in": "out",
            "proj_out": "in",
            "postprocess_conv": APART,
        }
    ),
    blocks=("StableAudioDiTBlock",),
)
