"""CogVideoX."""

import math

from gfprune_cli.families.family import APART, Ends, Family, Inputs, Request


def cogvideox(request: Request) -> Inputs:
    config = request.config
    frames = request.sizes.frames or (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    depth = config.patch_size_t or 1
    frames = depth * math.ceil(frames / depth)
    height, width = request.area(config.sample_height, config.sample_width)
    inputs: Inputs = {
        "hidden_states": request.zeros(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": request.text(config.max_text_seq_length, config.text_embed_dim),
        "timestep": request.index(1) + 1,
    }
    if config.use_rotary_positional_embeddings:
        tokens = (frames // depth) * (height // config.patch_size) * (width // config.patch_size)
        angles = request.zeros(tokens, config.attention_head_dim)
        inputs["image_rotary_emb"] = (angles + 1, angles)
    if config.ofs_embed_dim:
        inputs["ofs"] = request.time()
    return inputs


FAMILY = Family(
    classes=("CogVideoXTransformer3DModel",),
    inputs=cogvideox,
    ends=Ends({"time_embedding": APART, "ofs_embedding": APART, "proj_out": "in"}),
    pairs={"CogVideoXBlock": ("hidden_states", "encoder_hidden_states")},
)
