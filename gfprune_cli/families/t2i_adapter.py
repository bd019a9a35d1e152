"""T2I adapters: of a picture alone what is added to the states of a U-Net's encoder, once for all steps."""

from gfprune_cli.families.family import Family, Inputs, Request

EDGE = 512  # of the picture


def adapter(request: Request) -> Inputs:
    scale = request.model.total_downscale_factor
    height, width = request.area(EDGE)
    edges = (max(scale, edge - edge % scale) for edge in (height, width))
    return {"x": request.zeros(1, request.config.in_channels, *edges)}


FAMILY = Family(
    classes=("T2IAdapter",),
    inputs=adapter,
    adds=("down_intrablock_additional_residuals",),
)
