"""Qwen-Image."""

from gfprune_cli.families.family import Family

FAMILY = Family(
    classes=("QwenImageTransformer2DModel",),
    inputs=None,  # it is told the shapes of its images as a list, which its pipeline makes
    pairs={"QwenImageTransformerBlock": ("encoder_hidden_states", "hidden_states")},
)
