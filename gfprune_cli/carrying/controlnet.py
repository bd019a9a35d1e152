"""A ControlNet of the dense U-Net -> for the pruned one.

It copies the dense encoder and stays as it is, but for its last layers, the convolutions whose outputs are
added to the streams of the U-Net: they keep the rows of the channels that the streams still have.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from gfprune_cli.carrying.carried import Carried, Tensors, chosen
from gfprune_cli.carrying.files import Adapter
from gfprune_cli.carrying.target import Target
from gfprune_cli.checkpoint.correspondence import Stays
from gfprune_cli.checkpoint.files import first_line, quoted, read_config, trusted_roots
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.errors import GfpruneError
from gfprune_cli.structure.removal import rebuild

CLASSES = ("ControlNetModel", "ControlNetUnionModel")


def class_of(adapter: Adapter) -> str:
    """What the configuration beside an adapter names; empty where there is none."""
    folder = adapter.path.parent
    if not (folder / "config.json").is_file():
        return ""
    return str(read_config(folder / "config.json", trusted_roots(folder)).get("_class_name"))


def carry_controlnet(adapter: Adapter, target: Target) -> Carried:
    """The ControlNet that fits, and what became of its outputs.

    Raises:
        GfpruneError: it is damaged, or for another network.
    """
    folder = adapter.path.parent
    (name, config), state = checked_config(folder, adapter.tensors), dict(adapter.tensors)
    if not hasattr(target.network, "down_blocks"):
        raise GfpruneError(f"{folder} is a {name}, and {target.component.class_name} is no U-Net")
    carried = Carried()
    for layer, stream in zip(outputs(state), streams(target), strict=False):
        stays = stream_stays(target, stream)
        size = stays.size if stays is not None else target.network.get_submodule(stream[-1]).weight.shape[0]
        narrow_output(carried, state, layer, stays, size, folder)
    if carried.layers != len(outputs(state)) or carried.layers != len(list(streams(target))):
        raise GfpruneError(f"{folder} has {len(outputs(state))} outputs: it is for another network")
    config["gfprune"] = {"format": 1, "modules": carried.shapes}
    carried.tensors, carried.network = state, rebuild(pruned_class(name), config, state)
    return carried


def narrow_output(
    carried: Carried, state: Tensors, layer: str, stays: Stays | None, size: int, folder: Path
) -> None:
    """Leave a layer, in `state`, the rows of the channels that its stream still has.

    Args:
        stays: what is left of the stream, which had `size` channels in the dense network.

    Raises:
        GfpruneError: the layer writes to another stream.
    """
    rows, columns = state[f"{layer}.weight"].shape[:2]
    if rows != size:
        raise GfpruneError(
            f"{folder}: {quoted(layer)} has {rows} outputs, its stream in the dense network {size}: the "
            "ControlNet is for another network, or for the pruned one already"
        )
    carried.layers += 1
    if stays is not None:
        carried.narrowed += 1
        carried.shapes[layer] = {"out": len(stays.indices), "in": columns}
        for leaf in ("weight", "bias"):
            state[f"{layer}.{leaf}"] = chosen(state[f"{layer}.{leaf}"], stays, 0)


def checked_config(folder: Path, tensors: Tensors) -> tuple[str, dict[str, Any]]:
    """Class and configuration of a network that adapts another one.

    Raises:
        GfpruneError: the configuration does not describe the tensors.
    """
    config = read_config(folder / "config.json", trusted_roots(folder))
    name = str(config["_class_name"])
    try:
        with torch.device("meta"):
            network = getattr(diffusers, name).from_config(copy.deepcopy(config))
    except Exception as error:  # a broken configuration can fail anywhere in the constructor
        raise GfpruneError(f"{folder}/config.json describes no {name}: {first_line(error)}") from error
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if wanted != {key: tensor.shape for key, tensor in tensors.items()}:
        raise GfpruneError(f"{folder}: weights and config.json belong to different networks")
    return name, {key: value for key, value in config.items() if not key.startswith("_")}


def outputs(state: Tensors) -> list[str]:
    """The layers whose outputs are added, in the order of the streams."""
    down = {name.split(".")[1] for name in state if name.startswith("controlnet_down_blocks.")}
    return [f"controlnet_down_blocks.{index}" for index in range(len(down))] + ["controlnet_mid_block"]


def streams(target: Target) -> Iterator[tuple[str, ...]]:
    """For each tensor that is added to, the layers of the dense U-Net that write it, the last one last."""
    network = target.dense_network
    written = ["conv_in"]
    yield tuple(written)
    for index, block in enumerate(network.down_blocks):
        attentions = getattr(block, "attentions", None)
        for number in range(len(block.resnets)):
            place = f"down_blocks.{index}"
            written.append(f"{place}.resnets.{number}.conv2")
            if attentions is not None:
                written.append(f"{place}.attentions.{number}.proj_out")
            yield tuple(written)
        if block.downsamplers is not None:
            written.append(f"down_blocks.{index}.downsamplers.0.conv")
            yield tuple(written)
    written.append(f"mid_block.resnets.{len(network.mid_block.resnets) - 1}.conv2")
    yield tuple(written)


def stream_stays(target: Target, written: tuple[str, ...]) -> Stays | None:
    """What is left of a stream: what its last layer still writes, or the one before it if that is gone."""
    for name in reversed(written):
        place = target.map.layer(name)
        if place is not None:
            return place[1].out
    return None
