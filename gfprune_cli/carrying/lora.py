"""A LoRA of the dense network -> of the pruned one.

For W + B A of a layer, removal keeps rows `out` and columns `into` of W; B keeps the rows, A the columns, so
that (fused, then removed) and (removed, then carried) are one network. DoRA scales each row of W + B A to a
length of its own. Its rows keep their direction, so the length shrinks with what went of the row.

A layer that was folded is U (F x) + c, of rank r. What a LoRA adds, B (A x), reads inputs that F does not
hand on, and has outputs that U does not reach: no change of U and F at that rank is the same. The pruned
class has a place beside the two (`Beside`), where B A is as it was. DoRA has no such place: it scales the
rows of W, which is not there.
"""

import re

import torch

from gfprune_cli.carrying.carried import Carried, Tensors, chosen
from gfprune_cli.carrying.target import Target, layer_sizes
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.correspondence import Layer
from gfprune_cli.checkpoint.files import quoted
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import BESIDE
from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.tensor_files import opened

LEAF = re.compile(
    r"(?P<layer>.+)\.(?P<leaf>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)"
)
MAGNITUDE = "lora_magnitude_vector"
WIDENED = ("x_embedder",)  # a control LoRA reads more channels than the network has


def carry_lora(tensors: Tensors, target: Target) -> Carried:
    """Slice and rename.

    Args:
        tensors: in the spelling of `spelling.normalised`.

    Raises:
        GfpruneError: the LoRA is for another network, or DoRA needs a dense model that is not there.
    """
    begin = f"{target.prefix}."
    carried = Carried({name: value for name, value in tensors.items() if not name.startswith(begin)})
    for old, parts in by_layer(tensors, begin).items():
        carried.layers += 1
        place = target.place(old)
        if place is None:
            carried.dropped.append(old)
            continue
        new, layer = place
        check_sizes(target, old, new, layer, parts)
        factored = target.is_factored(new)
        if factored and MAGNITUDE in parts:
            carried.dropped.append(old)
            continue
        left = {leaf: sliced(leaf, value, layer) for leaf, value in parts.items()}
        if MAGNITUDE in left:  # |row of W' + B' A'| / |row of W + B A|
            dense = chosen(row_lengths(target.dense, old, parts), layer.out, 0)
            ratio = row_lengths(target.component, new, left) / dense
            left[MAGNITUDE] *= ratio.view_as(left[MAGNITUDE]).to(left[MAGNITUDE].dtype)
        carried.moved += new != old
        carried.narrowed += layer.out is not None or layer.into is not None
        into = f"{begin}{new}.{BESIDE}" if factored else f"{begin}{new}"
        carried.tensors |= {f"{into}.{leaf}": value.contiguous() for leaf, value in left.items()}
    return carried


def by_layer(tensors: Tensors, begin: str) -> dict[str, Tensors]:
    """Layer of the network -> its tensors by leaf.

    Raises:
        GfpruneError: a tensor is of no known kind.
    """
    layers: dict[str, Tensors] = {}
    for name, value in tensors.items():
        if name.startswith(begin):
            match = LEAF.fullmatch(name.removesuffix(".default.weight"))
            if match is None:
                raise GfpruneError(
                    f"tensor {quoted(name)} of the adapter is none of a LoRA or DoRA: remove it"
                )
            layers.setdefault(match["layer"].removeprefix(begin), {})[match["leaf"]] = value
    return layers


def check_sizes(target: Target, old: str, new: str, layer: Layer, parts: Tensors) -> None:
    """Refuse a LoRA of another network, before it is cut to something that fits by chance."""
    where = f"layer {quoted(old)} of the adapter"
    left = layer_sizes(target.network, new)
    if left is None:
        raise GfpruneError(
            f"{where} is for another network: {target.component.class_name} has none of that name"
        )
    for leaf, dimension, stays, what in (
        ("lora_B.weight", 0, layer.out, "outputs"),
        ("lora_A.weight", 1, layer.into, "inputs"),
    ):
        if leaf not in parts:
            raise GfpruneError(f"{where} has no {leaf}: the file is incomplete")
        found, wanted = parts[leaf].shape[dimension], left[dimension] if stays is None else stays.size
        if found == wanted or (dimension and stays is None and found > wanted and old in WIDENED):
            continue
        hint = "was the adapter made for the pruned one?" if found == left[dimension] else "it is for another"
        raise GfpruneError(f"{where} has {found} {what}, that of the dense network {wanted}: {hint}")


def sliced(leaf: str, tensor: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The rows or columns that are left of one tensor, times the factor that removal put on the layer."""
    if leaf == "lora_A.weight":
        return chosen(tensor, layer.into, 1)
    if leaf == MAGNITUDE:
        lengths = [index for index, size in enumerate(tensor.shape) if size > 1]
        return chosen(tensor, layer.out, lengths[0] if lengths else 0).clone()
    return chosen(tensor, layer.out, 0, layer.scale)


def row_lengths(component: Component, layer: str, parts: Tensors) -> torch.Tensor:
    """|row of W + B A| [out] for a layer on disk and its `parts` of a LoRA.

    Raises:
        GfpruneError: the layer's weight is not there.
    """
    name = f"{layer}.weight"
    if name not in component.tensors:
        raise GfpruneError(f"{component.folder} has no tensor {quoted(name)}, which DoRA is measured by")
    with opened(component.tensors[name].file) as read:
        weight = read(name).float()
    product = parts["lora_B.weight"].float().flatten(1) @ parts["lora_A.weight"].float().flatten(1)
    lengths: torch.Tensor = torch.linalg.vector_norm(weight.flatten(1) + product, dim=1)
    return lengths
