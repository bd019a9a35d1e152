"""comfyui: the denoiser in one file, in the naming of its authors, if ComfyUI can tell what network it is.

ComfyUI reads no configuration: it counts the blocks in the names, measures some widths, and takes the rest
from the family that these point to (its comfy/model_detection.py and comfy/supported_models.py). What it
would get wrong, or not recognise, is refused here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.shards import saved_tensors
from gfprune_cli.checkpoint.single_file import KEY
from gfprune_cli.deploy.format import Format, Job
from gfprune_cli.deploy.original_names import NAMES, unet_places, unknown_name
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.durable import write_tensors

PREFIX = "model.diffusion_model."
# whose names ComfyUI knows without it, too, and diffusers only without it
BARE = ("QwenImageTransformer2DModel",)
CHANNELS = 320  # of the first stage of every U-Net that is listed
HEAD = 128  # dimension of a head of Flux, Wan and Qwen-Image
SD3_HEAD, SD3_CHANNELS = 64, 16  # dimension of a head, channels of a latent
# heads of transformers whose number is not told by their width
HEADS = {"FluxTransformer2DModel": 24, "QwenImageTransformer2DModel": 24}
LAST = "output_blocks.11.1"  # by whose weights a v prediction of Stable Diffusion 2 is known
HEADS_BY_TEXT = {768: "8 heads", 1024: "heads of 64", 2048: "heads of 64"}  # width of the text -> attention
# blocks of the transformer behind each residual block of the encoder: SDXL, SSD-1B, Vega, KOALA
XL_DEPTHS = ([0, 0, 2, 2, 10, 10], [0, 0, 2, 2, 4, 4], [0, 0, 1, 1, 2, 2], [0, 2, 5], [0, 2, 6])


def check_expressible(component: Component, model: Any) -> None:
    """Refuse a network that ComfyUI would take for another one, or for none.

    Args:
        model: the network; the meta device is enough.

    Raises:
        UsageError: with the reason.
    """
    name = component.class_name
    reason = f"it has no file format for {name} here; known are {', '.join(sorted(NAMES))}"
    if component.is_pruned:
        reason = "it builds stock networks alone, without widths of their own; prune with --layout native"
    elif name in NAMES:
        reason = REASONS.get(name, head_reason)(model)
        reason = reason or prediction_reason(component, model)
        if not reason and (left := unknown_name(model)) is not None:
            reason = f"its authors have no name for {left}"
    if reason:
        raise UsageError(f"--format comfyui: ComfyUI cannot hold this network: {reason}")


def head_reason(model: Any) -> str:
    """Of transformers."""
    heads, config = HEADS.get(type(model).__name__), model.config
    fixed = config.attention_head_dim == HEAD and heads in (None, config.num_attention_heads)
    return "" if fixed else f"it expects {f'{heads} ' if heads else ''}heads of {HEAD} channels"


def prediction_reason(component: Component, model: Any) -> str:
    """Of U-Nets that predict v: which ones do is not in the file."""
    if type(model).__name__ != "UNet2DConditionModel":
        return ""
    scheduler: Any = load_scheduler(component)
    config = {} if scheduler is None else scheduler.config
    if config.get("prediction_type") != "v_prediction":
        return ""
    told = model.config.cross_attention_dim == 1024 and any(
        place == LAST for place, _ in unet_places(model).values()
    )
    return "" if told else "it would take its v prediction for one of epsilon"


def sd3_reason(model: Any) -> str:
    """Of Stable Diffusion 3, of which the width of the patch embedding tells nearly all."""
    config = model.config
    width, blocks = config.num_attention_heads * config.attention_head_dim, config.num_layers
    if config.attention_head_dim != SD3_HEAD:
        return f"it expects heads of {SD3_HEAD} channels"
    if width != SD3_HEAD * blocks:
        return (
            f"it takes the number of SD3's blocks from their width: of {width} channels it expects "
            f"{width // SD3_HEAD} blocks, and this one has {blocks}; blocks cannot go alone"
        )
    if config.in_channels != SD3_CHANNELS:
        return f"it expects latents of {SD3_CHANNELS} channels"
    return "" if config.qk_norm in (None, "rms_norm") else f"it knows no {config.qk_norm} of queries and keys"


def unet_reason(model: Any) -> str:
    """Of Stable Diffusion 1 and 2 and SDXL."""
    config = model.config
    widths, text = list(config.block_out_channels), config.cross_attention_dim
    if widths[0] != CHANNELS or text not in HEADS_BY_TEXT or config.use_linear_projection != (text > 768):
        return f"it is none of Stable Diffusion 1.5, 2 and SDXL: {widths[0]} channels, text of {text}"
    uneven = [width for width in widths if width % widths[0]]
    if uneven:
        return f"a stage of {uneven[0]} channels is no multiple of the first one's {widths[0]}"
    for module in model.modules():
        if type(module).__name__ == "Attention":
            known = module.heads == 8 if text == 768 else module.to_q.out_features == 64 * module.heads
            if not known:
                return f"it expects {HEADS_BY_TEXT[text]} in every attention, and a stage has {module.heads}"
    depths = depths_of(model)
    if text == 2048 and depths not in XL_DEPTHS:
        return f"of SDXL it knows the depths {', '.join(map(str, XL_DEPTHS))}, and this one has {depths}"
    return ""


def depths_of(model: Any) -> list[int]:
    """Transformer blocks behind each residual block of the encoder."""
    return [
        len(block.attentions[layer].transformer_blocks) if getattr(block, "attentions", None) else 0
        for block in model.down_blocks
        for layer in range(len(block.resnets))
    ]


REASONS = {"UNet2DConditionModel": unet_reason, "SD3Transformer2DModel": sd3_reason}


def write_original(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the file, and read it back; equal inputs give equal bytes.

    Raises:
        GfpruneError: a tensor is missing or differs.
    """
    kind = type(model).__name__
    prefix = "" if kind in BARE else PREFIX
    tensors = {prefix + name: one for name, one in NAMES[kind](model, saved_tensors(model)).items()}
    text = json.dumps({"format": 1, "record": dict(record)}, sort_keys=True, allow_nan=False)
    write_tensors(path, tensors, metadata=(KEY, text))
    found = load_file(path)
    for name, tensor in tensors.items():
        if not torch.equal(found.pop(name, torch.empty(0)), tensor):
            raise GfpruneError(f"{path.name} does not hold tensor {name} as it was written")
    if found:
        raise GfpruneError(f"{path.name} holds tensors that nobody wrote: {min(found)}")


def write_authors_file(job: Job, path: Path, record: Mapping[str, Any]) -> nn.Module:
    """The file that the job asks for."""
    network = job.network()
    write_original(path, network, record)
    return network


FORMAT = Format(
    file=write_authors_file,
    check=check_expressible,
    loading=lambda job, name: f"# in ComfyUI: models/diffusion_models/{name}, node Load Diffusion Model",
)
