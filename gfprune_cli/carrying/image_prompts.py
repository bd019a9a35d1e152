"""An IP-Adapter of the dense network -> of the pruned one.

It brings keys and values of its own to the attention layers that read the prompt, named by the number of the
layer: rows of heads that are left stay, layers are numbered anew. The projection of the image stays as it is.
"""

import re
from collections.abc import Iterator

import torch

from gfprune_cli.carrying.carried import Carried, Tensors, chosen
from gfprune_cli.carrying.target import Target, layer_sizes
from gfprune_cli.checkpoint.correspondence import Layer
from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import receivers
from gfprune_cli.errors import GfpruneError

BEGIN = "ip_adapter."
PROJECTION = "image_proj."
NAME = re.compile(
    r"ip_adapter\.(?P<number>\d+)\.(?P<leaf>to_(?P<layer>[kvq]|out)_(?P<kind>ip|lora\.down|lora\.up)\.\w+)"
)


def is_image_prompt(tensors: Tensors) -> bool:
    """Whether an adapter brings image prompts."""
    return any(name.startswith(BEGIN) for name in tensors)


def carry_image_prompts(tensors: Tensors, target: Target) -> Carried:
    """Slice and renumber.

    Raises:
        GfpruneError: it is for another network, or of a kind that is not known.
    """
    if not hasattr(target.network, "attn_processors"):
        raise GfpruneError(f"{target.component.class_name} has no attention that reads image prompts")
    before, after = receivers(target.dense_network), receivers(target.network)
    orders = {  # of layers that read the prompt, and of all that a LoRA of the adapter sits on
        "ip": (dict(before), {name: number for number, name in after}),
        "lora": (dict(enumerate(processors(target.dense_network))), numbered(target.network)),
    }
    carried = Carried({name: value for name, value in tensors.items() if name.startswith(PROJECTION)})
    seen: dict[str, bool] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if name.startswith(PROJECTION):
            continue
        if match is None:
            raise GfpruneError(f"tensor {quoted(name)} is of no IP-Adapter that gfprune knows")
        names, numbers = orders[match["kind"].partition(".")[0]]
        attention = names.get(int(match["number"]))
        if attention is None:
            raise GfpruneError(
                f"tensor {quoted(name)} is for another network: the dense one has no such layer"
            )
        layer = f"{attention}.to_{match['layer']}" + (".0" if match["layer"] == "out" else "")
        place = target.map.layer(layer)
        if attention not in seen:
            seen[attention] = place is not None
            count(carried, attention, target)
        if place is not None:
            new, left = place
            check_rows(target, name, tensor.shape, new, left, match["kind"])
            number = numbers[target.map.new_name(attention) or ""]
            carried.tensors[f"{BEGIN}{number}.{match['leaf']}"] = sliced_heads(tensor, left, match["kind"])
    return carried


def processors(network: object) -> Iterator[str]:
    """All attention layers, in the order in which diffusers numbers them."""
    return (name.removesuffix(".processor") for name in network.attn_processors)  # type: ignore[attr-defined]


def numbered(network: object) -> dict[str, int]:
    return {name: index for index, name in enumerate(processors(network))}


def count(carried: Carried, attention: str, target: Target) -> None:
    """Enter one attention layer in the sums."""
    carried.layers += 1
    place = target.map.layer(f"{attention}.to_k")
    if place is None:
        carried.dropped.append(attention)
    else:
        carried.moved += place[0] != f"{attention}.to_k"
        carried.narrowed += place[1].out is not None


def check_rows(target: Target, name: str, shape: tuple[int, ...], new: str, left: Layer, kind: str) -> None:
    """Refuse an adapter of another network.

    Raises:
        GfpruneError: a tensor has not the dense layer's outputs, or inputs.
    """
    sizes = layer_sizes(target.network, new)
    dimension = 1 if kind == "lora.down" else 0
    stays = (left.out, left.into)[dimension]
    wanted = stays.size if stays is not None else sizes[dimension] if sizes is not None else 0
    if shape[dimension] != wanted:
        raise GfpruneError(
            f"tensor {quoted(name)} has {shape[dimension]} channels, and its layer in the dense network "
            f"{wanted}: the adapter is for another network, or for the pruned one already"
        )


def sliced_heads(tensor: torch.Tensor, left: Layer, kind: str) -> torch.Tensor:
    """The rows, or of the first half of a low-rank product the columns, that are left."""
    if kind == "lora.down":
        return chosen(tensor, left.into, 1)
    found = chosen(tensor, left.out, 0)
    return found if kind == "ip" or left.scale == 1 else (found.float() * left.scale).to(tensor.dtype)
