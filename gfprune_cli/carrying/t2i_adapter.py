"""A T2I adapter of the dense U-Net -> for the pruned one.

What a stage of it adds to a stream is also what its next stage reads, so its network keeps all channels; of
its outputs the pruned class hands on those that the streams still have.
"""

from typing import Any

import diffusers
import torch

from gfprune_cli.carrying.carried import Carried
from gfprune_cli.carrying.controlnet import checked_config, stream_stays, streams
from gfprune_cli.carrying.files import Adapter
from gfprune_cli.carrying.target import Target
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class, streams_of_unet
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.removal import rebuild

CLASS = "T2IAdapter"


def carry_t2i_adapter(adapter: Adapter, target: Target) -> Carried:
    """The adapter that fits, and what became of its outputs.

    Raises:
        GfpruneError: it is damaged, or for another network.
    """
    folder = adapter.path.parent
    _, config = checked_config(folder, adapter.tensors)
    if not hasattr(target.network, "down_blocks"):
        raise GfpruneError(f"{folder} is a {CLASS}, and {target.component.class_name} is no U-Net")
    _, ends, middle = streams_of_unet(target.network)
    stays = [stream_stays(target, written) for written in stages(target)]
    widths = [
        left.size if left is not None else width for left, width in zip(stays, [*ends, middle], strict=True)
    ]
    channels = channels_of(config)
    if channels != widths[: len(channels)]:
        raise GfpruneError(
            f"{folder} adds {channels} channels, and the stages of the dense network have {widths}: it is "
            "for another network"
        )
    stays = stays[: len(channels)]
    features = [None if left is None else list(left.indices) for left in stays]
    config["gfprune"] = {"format": 1, "modules": {}, "features": features}
    return Carried(
        dict(adapter.tensors),
        layers=len(channels),
        narrowed=len(features) - features.count(None),
        network=rebuild(pruned_class(CLASS), config, adapter.tensors),
    )


def stages(target: Target) -> list[tuple[str, ...]]:
    """For each stage of the U-Net that is added to, the layers that write its stream, the last one last."""
    walk, found = streams(target), []
    next(walk)
    for block in target.dense_network.down_blocks:
        inside = [next(walk) for _ in block.resnets]
        behind = [next(walk) for _ in block.downsamplers or ()]
        crosses = getattr(block, "has_cross_attention", False)
        found.append((inside if crosses else inside + behind)[-1])
    return [*found, next(walk)]


def channels_of(config: dict[str, Any]) -> list[int]:
    """Channels of each output of an adapter; its configuration says them differently for each type."""
    with torch.device("meta"):
        network = diffusers.T2IAdapter.from_config(config)
        side = network.total_downscale_factor
        return [feature.shape[1] for feature in network(torch.empty(1, config["in_channels"], side, side))]
