"""An IP-Adapter of the dense network -> of the pruned one.

It brings keys and values of its own to the attention layers that read the prompt, named by the number of the
layer: rows of heads that are left stay, layers are numbered anew. The projection of the image stays as it is.

In Flux, what the heads make of the image is added to the stream as it is: head h writes the h-th part of its
channels. Where heads or channels went, the tensor `places` says for each channel left which output it gets.
"""

import re
from collections.abc import Iterator

import torch
from diffusers.loaders.transformer_flux import FluxTransformer2DLoadersMixin

from gfprune_cli.carrying.carried import Carried, Tensors, chosen
from gfprune_cli.carrying.target import Target, layer_sizes
from gfprune_cli.checkpoint.correspondence import Layer
from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import PLACED, receivers
from gfprune_cli.errors import GfpruneError

BEGIN = "ip_adapter."
PROJECTION = "image_proj."
NAME = re.compile(
    r"ip_adapter\.(?P<number>\d+)\.(?P<leaf>to_(?P<layer>[kvq]|out)_(?P<kind>ip|lora\.down|lora\.up)\.\w+)"
)
XLABS = re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.")  # Flux
XLABS_PROJECTION = "ip_adapter_proj_model."


def is_image_prompt(tensors: Tensors) -> bool:
    """Whether an adapter brings image prompts."""
    return any(name.startswith(BEGIN) or XLABS.match(name) for name in tensors)


def diffusers_name(name: str) -> str:
    """The name that diffusers gives a tensor of XLabs' adapters for Flux; any other name as it is."""
    if name.startswith(XLABS_PROJECTION):
        return PROJECTION + name.removeprefix(XLABS_PROJECTION)
    return XLABS.sub(rf"{BEGIN}\1.to_\2_ip.", name)


def carry_image_prompts(tensors: Tensors, target: Target) -> Carried:
    """Slice and renumber.

    Args:
        tensors: in the names of diffusers or XLabs; those of the result are diffusers'.

    Raises:
        GfpruneError: it is for another network, or of a kind that is not known.
    """
    if not hasattr(target.network, "attn_processors"):
        raise GfpruneError(f"{target.component.class_name} has no attention that reads image prompts")
    before, after = receivers(target.dense_network), receivers(target.network)
    orders = {  # of layers that read the prompt, and of all that a LoRA of the adapter sits on
        "ip": (dict(before), {name: number for number, name in after}),
        "lora": (
            dict(enumerate(processors(target.dense_network))),
            {name: number for number, name in enumerate(processors(target.network))},
        ),
    }
    tensors = {diffusers_name(name): value for name, value in tensors.items()}
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
            carried.tensors |= channels_of_heads(target, attention) if match["kind"] == "ip" else {}
        if place is not None:
            new, left = place
            check_rows(target, name, tensor.shape, new, left, match["kind"])
            number = numbers[target.map.new_name(attention) or ""]
            carried.tensors[f"{BEGIN}{number}.{match['leaf']}"] = sliced_heads(tensor, left, match["kind"])
    return carried


def processors(network: object) -> Iterator[str]:
    """All attention layers, in the order in which diffusers numbers them."""
    return (name.removesuffix(".processor") for name in network.attn_processors)  # type: ignore[attr-defined]


def count(carried: Carried, attention: str, target: Target) -> None:
    """Enter one attention layer in the sums."""
    carried.layers += 1
    place = target.map.layer(f"{attention}.to_k")
    if place is None:
        carried.dropped.append(attention)
    else:
        carried.moved += place[0] != f"{attention}.to_k"
        carried.narrowed += place[1].out is not None


def channels_of_heads(target: Target, attention: str) -> Tensors:
    """For each channel of Flux's stream the output of the heads that it gets; nothing where that is its own.

    The number of outputs stands for none.
    """
    name, written = target.map.new_name(attention), target.map.layer(f"{attention}.to_out.0")
    given = target.map.layer(f"{attention}.to_v")
    if not isinstance(target.network, FluxTransformer2DLoadersMixin) or not (name and written and given):
        return {}
    width = range(target.dense_network.inner_dim)
    outputs, stream = (
        list(width if layer.out is None else layer.out.indices) for _, layer in (given, written)
    )
    if outputs == stream:
        return {}
    order = {channel: index for index, channel in enumerate(outputs)}
    number = next(number for number, receiver in receivers(target.network) if receiver == name)
    found = torch.tensor([order.get(channel, len(outputs)) for channel in stream])
    return {f"{BEGIN}{number}.{PLACED}": found}


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
    return chosen(tensor, left.out, 0, 1.0 if kind == "ip" else left.scale)
