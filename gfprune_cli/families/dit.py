"""DiT (arXiv 2212.09748)."""

from gfprune_cli.families.family import Ends, Family, Inputs, Request, picture


def dit(request: Request) -> Inputs:
    return {
        "hidden_states": picture(request),
        "timestep": request.index(1) + 1,
        "class_labels": request.index(1),
    }


FAMILY = Family(
    classes=("DiTTransformer2DModel",),
    inputs=dit,
    ends=Ends({"proj_out_1": "out", "proj_out_2": "in"}),
    blocks=("BasicTransformerBlock",),
)
