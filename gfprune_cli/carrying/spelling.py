"""The many spellings of a LoRA -> one: the names of PEFT behind the name of a component, no alphas.

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight

The scale alpha / rank of each layer goes into `lora_B`, which leaves the product as it was. Names of kohya's
trainers are looked up among the layers of the dense network; all others are read by diffusers' converters.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft

from gfprune_cli.carrying.carried import Tensors
from gfprune_cli.carrying.files import Adapter
from gfprune_cli.carrying.target import Target
from gfprune_cli.checkpoint.files import first_line, quoted
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.errors import GfpruneError

KOHYA = ("lora_unet_", "lycoris_")
PEFT = "base_model.model."
KOHYA_LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
    "alpha": "alpha",
}
UP = re.compile(r"(?P<layer>.+?)(?:\.lora_B|\.lora\.up|_lora\.up|\.lora_linear_layer\.up)\.weight")
DOWN = re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight$")  # diffusers names some alphas so
OTHER_KINDS = ("lokr_", "hada_", "lora_mid", "oft_", "glora", ".diff", "ia3_")
# whose pipeline reads the LoRAs of a network that lies in no pipeline
PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "WanTransformer3DModel": "WanPipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
}


def common_name(adapter: Adapter, target: Target) -> Tensors:
    """A LoRA in the one spelling.

    Returns:
        Tensors of all components; those that are not for the pruned network keep their names.

    Raises:
        GfpruneError: it is no LoRA, or of a kind that does not slice.
    """
    tensors = dict(adapter.tensors)
    other = [name for name in tensors if any(kind in name for kind in OTHER_KINDS)]
    if other:
        raise GfpruneError(
            f"{adapter.path}: tensor {quoted(other[0])} belongs to no plain LoRA or DoRA (LoKr, LoHa and the "
            "like are products that rows and columns cannot be taken from): fuse it into the dense model and "
            "prune that"
        )
    scales: dict[str, float] = {}
    if any(name.startswith(PEFT) for name in tensors):
        tensors = {f"{target.prefix}.{name.removeprefix(PEFT)}": value for name, value in tensors.items()}
    elif any(name.startswith(KOHYA) for name in tensors):
        tensors = from_kohya(tensors, adapter, target)
    elif not is_plain(tensors, target):
        tensors, scales = from_others(tensors, adapter, target)
    begin = f"{target.prefix}."
    own = {name: value for name, value in tensors.items() if name.startswith(begin)}
    found = {name: value for name, value in tensors.items() if name not in own}
    for name, value in convert_unet_state_dict_to_peft(own).items():
        found[name.replace(".processor.", ".")] = value
    scales |= {name: float(value) for name, value in found.items() if name.endswith(".alpha")}
    by_layer = {
        DOWN.sub("", name.removesuffix(".alpha")).replace(".processor.", "."): value
        for name, value in scales.items()
    }
    return {
        name: folded(name, value, by_layer, adapter.settings)
        for name, value in found.items()
        if not name.endswith(".alpha")
    }


def is_plain(tensors: Tensors, target: Target) -> bool:
    """Whether all names begin with a component's, and are of layers as diffusers calls them."""
    components = {target.prefix, "text_encoder", "text_encoder_2", "text_encoder_3", "transformer_2"}
    return all(name.split(".")[0] in components for name in tensors)


def from_kohya(tensors: Tensors, adapter: Adapter, target: Target) -> Tensors:
    """Names like lora_unet_mid_block_attentions_0_proj_in.lora_down.weight."""
    layers = {name.replace(".", "_"): name for name, _ in target.dense_network.named_modules()}
    own, rest = {}, {}
    for name, value in tensors.items():
        begin = next((begin for begin in KOHYA if name.startswith(begin)), "")
        stem, _, leaf = name.removeprefix(begin).partition(".")
        if begin and stem in layers and leaf in KOHYA_LEAVES:
            own[f"{target.prefix}.{layers[stem]}.{KOHYA_LEAVES[leaf]}"] = value
        else:
            rest[name] = value
    if any(name.startswith(KOHYA) for name in rest):  # layers by the names of another program
        own, rest = {}, dict(tensors)
    found, scales = from_others(rest, adapter, target) if rest else ({}, {})
    return {**own, **found, **{name: torch.tensor(value) for name, value in scales.items()}}


def from_others(tensors: Tensors, adapter: Adapter, target: Target) -> tuple[Tensors, dict[str, float]]:
    """What diffusers' converter of the pipeline makes of it: tensors, and alphas by name."""
    reader = reader_of(target)
    magnitudes = {
        name.removesuffix(".dora_scale"): value for name, value in tensors.items() if "dora_" in name
    }
    given = {name: value for name, value in tensors.items() if "dora_" not in name}
    stems = {
        id(value): name.rpartition(".lora_down")[0] for name, value in given.items() if "lora_down" in name
    }
    settings = (
        {"unet_config": target.dense_network.config} if target.prefix == "unet" else {"return_alphas": True}
    )
    try:
        found = reader.lora_state_dict(given, **settings)
    except Exception as error:  # converters raise what comes to hand
        raise GfpruneError(
            f"{adapter.path}: diffusers cannot read its names: {first_line(error)}; is it a LoRA for "
            f"{type(target.dense_network).__name__}?"
        ) from error
    state, alphas = found[:2] if isinstance(found, tuple) else (found, None)
    state = {str(name): value for name, value in state.items()}
    for name, value in convert_unet_state_dict_to_peft(dict(state)).items():
        stem = stems.get(id(value))
        if stem in magnitudes:
            state[name.replace(".lora_A.weight", ".lora_magnitude_vector")] = magnitudes.pop(stem)
    if magnitudes:
        raise GfpruneError(
            f"{adapter.path}: where {quoted(next(iter(magnitudes)))}.dora_scale belongs is not known: save "
            "the adapter with diffusers' or PEFT's names"
        )
    return state, {name: float(value) for name, value in (alphas or {}).items()}


def reader_of(target: Target) -> Any:
    """The pipeline class that knows the spellings for this network.

    Raises:
        GfpruneError: diffusers has none that reads LoRAs.
    """
    pipeline = target.component.pipeline or {}
    default = PIPELINES.get(stock_name(target.component.class_name), "")
    name = str(pipeline.get("_class_name", default))
    found = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
    if not isinstance(found, type) or not hasattr(found, "lora_state_dict"):
        raise GfpruneError(
            f"diffusers reads no LoRA for {name or target.component.class_name}: save the adapter with names "
            f"like {target.prefix}.LAYER.lora_A.weight"
        )
    return found


def folded(
    name: str, tensor: torch.Tensor, alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> torch.Tensor:
    """`lora_B` times the scale of its layer; any other tensor as it is."""
    match = UP.fullmatch(name)
    if match is None:
        return tensor
    layer, rank = match["layer"], tensor.shape[1]
    scale = alphas[layer] / rank if layer in alphas else scale_by_settings(layer, rank, settings)
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)


def scale_by_settings(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank as PEFT's configuration gives it: 1 where it says nothing."""
    component, _, inner = layer.partition(".")

    def said(key: str) -> Any:
        return settings.get(f"{component}.{key}", settings.get(key))

    alpha = said("lora_alpha")
    for pattern, value in (said("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", inner):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / math.sqrt(rank) if said("use_rslora") else alpha / rank
