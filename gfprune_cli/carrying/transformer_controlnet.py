"""A ControlNet of a dense transformer -> for the pruned one.

Its own network stays as it is; the last layers keep the rows of the channels that the stream still has.
diffusers spreads N outputs evenly over the blocks of a transformer. Where blocks are gone the spread would be
another one: then it puts out one sum for each block that is left, of what was added after that block and
after those behind it that are gone (after those before the first one that is left, too).
"""

import math

from gfprune_cli.carrying.carried import Carried
from gfprune_cli.carrying.controlnet import checked_config, narrow_output
from gfprune_cli.carrying.files import Adapter
from gfprune_cli.carrying.target import Target
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.removal import rebuild

# class of the ControlNet -> of the transformer
NETWORKS = {
    "FluxControlNetModel": "FluxTransformer2DModel",
    "QwenImageControlNetModel": "QwenImageTransformer2DModel",
    "SD3ControlNetModel": "SD3Transformer2DModel",
}
# its last layers -> the blocks that they are added after, and how the transformer calls their outputs
STACKS = {
    "controlnet_blocks": ("transformer_blocks", "controlnet_block_samples"),
    "controlnet_single_blocks": ("single_transformer_blocks", "controlnet_single_block_samples"),
}


def carry_transformer_controlnet(adapter: Adapter, target: Target) -> Carried:
    """The ControlNet that fits, and what became of its outputs.

    Raises:
        GfpruneError: it is damaged, or for another network.
    """
    folder, state = adapter.path.parent, dict(adapter.tensors)
    name, config = checked_config(folder, adapter.tensors)
    network = target.component.class_name
    if stock_name(network) != NETWORKS[name]:
        raise GfpruneError(f"{folder} is a {name}, and {network} is no {NETWORKS[name]}")
    place = target.map.layer("proj_out")  # what it reads is the stream
    stays = place[1].into if place else None
    size = stays.size if stays is not None else target.network.proj_out.in_features
    if stays is not None and not config.get("use_pos_embed", True):
        raise GfpruneError(
            f"{folder} reads the stream of the dense network (use_pos_embed is false), which became "
            "narrower: prune without --prune-width"
        )
    carried, samples = Carried(), {}
    for stack, (blocks, called) in STACKS.items():
        layers = sorted({".".join(key.split(".")[:2]) for key in state if key.startswith(f"{stack}.")})
        sums = sums_of_samples(target, name, config, blocks, len(layers)) if layers else None
        if sums is not None:
            samples[called], carried.moved = sums, carried.moved + len(layers)
        for layer in layers:
            narrow_output(carried, state, layer, stays, size, folder)
    config["gfprune"] = {"format": 1, "modules": carried.shapes, **({"samples": samples} if samples else {})}
    carried.tensors, carried.network = state, rebuild(pruned_class(name), config, state)
    return carried


def sums_of_samples(
    target: Target, name: str, config: dict[str, object], stack: str, count: int
) -> list[list[int]] | None:
    """For each block that is left, the outputs whose sum it gets; None where all blocks are there.

    Args:
        name: class of the ControlNet.
        count: of its outputs for this stack.
    """
    blocks = len(getattr(target.dense_network, stack))
    if blocks == len(getattr(target.network, stack)):
        return None
    sums: list[list[int]] = []
    waiting: list[int] = []
    for block in range(blocks):
        if config.get("conditioning_embedding_channels") is not None:  # XLabs' for Flux: from the start again
            sample = block % count
        elif name.startswith("SD3"):
            sample = int(block / (blocks / count))
        else:
            sample = block // math.ceil(blocks / count)
        if target.map.new_name(f"{stack}.{block}") is not None:
            sums.append([*waiting, sample])
            waiting = []
        else:
            (sums[-1] if sums else waiting).append(sample)
    return sums
