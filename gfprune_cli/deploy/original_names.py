"""From diffusers' names of tensors to those of a model's authors, which ComfyUI reads.

The other way round diffusers has it: `diffusers.loaders.single_file_utils`. Tests hold one against the other.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]  # pattern -> what stands in its place, one after the other
Joined = tuple[tuple[tuple[str, ...], str], ...]  # suffixes of parts in order -> that of the whole

UNET: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^(add|class)_embedding\.linear_1", "label_emb.0.0"),
    (r"^(add|class)_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
)
RESNET: Rules = (
    (r"\.norm1\b", ".in_layers.0"),
    (r"\.conv1\b", ".in_layers.2"),
    (r"\.norm2\b", ".out_layers.0"),
    (r"\.conv2\b", ".out_layers.3"),
    (r"\.time_emb_proj\b", ".emb_layers.1"),
    (r"\.conv_shortcut\b", ".skip_connection"),
)
FLUX: Rules = (
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2", ".txt_mlp.2"),
    (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
    (r"\.ff\.net\.2", ".img_mlp.2"),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"^(double_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.img_attn.norm.query_norm.scale"),
    (r"^(double_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.img_attn.norm.key_norm.scale"),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"^(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
)
FLUX_JOINED: Joined = (
    ((".attn.to_q", ".attn.to_k", ".attn.to_v", ".proj_mlp"), ".linear1"),  # of single blocks
    ((".attn.to_q", ".attn.to_k", ".attn.to_v"), ".img_attn.qkv"),
    ((".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"), ".txt_attn.qkv"),
)
WAN: Rules = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.ffn\.net\.0\.proj", ".ffn.0"),
    (r"\.ffn\.net\.2", ".ffn.2"),
    (r"^(blocks\.\d+)\.norm2\b", r"\1.norm#"),
    (r"^(blocks\.\d+)\.norm3\b", r"\1.norm2"),
    (r"\.norm#", ".norm3"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
)
SD3: Rules = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
    (r"\.attn\.norm_added_([qk])", r".context_block.attn.ln_\1"),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"^(joint_blocks\.\d+)\.(attn2?)\.norm_([qk])", r"\1.x_block.\2.ln_\3"),
)
SD3_JOINED: Joined = (
    ((".attn.to_q", ".attn.to_k", ".attn.to_v"), ".x_block.attn.qkv"),
    ((".attn2.to_q", ".attn2.to_k", ".attn2.to_v"), ".x_block.attn2.qkv"),
    ((".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"), ".context_block.attn.qkv"),
)


def renamed_by(rules: Rules, name: str) -> str:
    for pattern, place in rules:
        name = re.sub(pattern, place, name)
    return name


def unet_names(model: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of a `UNet2DConditionModel` under the names of CompVis and Stability AI."""
    places = unet_places(model)

    def new_name(name: str) -> str:
        for old, (new, is_resnet) in places.items():
            if name.startswith(f"{old}."):
                rest = name[len(old) :]
                return new + (renamed_by(RESNET, rest) if is_resnet else rest)
        return renamed_by(UNET, name)

    return {new_name(name): tensor for name, tensor in tensors.items()}


def unet_places(model: Any) -> dict[str, tuple[str, bool]]:
    """Module -> (its name there, whether it is a residual block): one list of layers for each side."""
    places: dict[str, tuple[str, bool]] = {}
    number = 1
    for stage, block in enumerate(model.down_blocks):
        own = f"down_blocks.{stage}"
        for layer in range(len(block.resnets)):
            places[f"{own}.resnets.{layer}"] = f"input_blocks.{number}.0", True
            places[f"{own}.attentions.{layer}"] = f"input_blocks.{number}.1", False
            number += 1
        if block.downsamplers is not None:
            places[f"{own}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op", False
            number += 1
    places["mid_block.resnets.0"] = "middle_block.0", True
    places["mid_block.attentions.0"] = "middle_block.1", False
    places["mid_block.resnets.1"] = "middle_block.2", True
    number = 0
    for stage, block in enumerate(model.up_blocks):
        own, attends = f"up_blocks.{stage}", getattr(block, "attentions", None) is not None
        for layer in range(len(block.resnets)):
            places[f"{own}.resnets.{layer}"] = f"output_blocks.{number}.0", True
            places[f"{own}.attentions.{layer}"] = f"output_blocks.{number}.1", False
            number += 1
        if block.upsamplers is not None:
            places[f"{own}.upsamplers.0"] = f"output_blocks.{number - 1}.{1 + attends}", False
    return places


def authors_names(
    rules: Rules, joined: Joined, swapped: tuple[str, ...], tensors: Tensors
) -> dict[str, torch.Tensor]:
    """Tensors of a transformer under the names of its authors.

    Args:
        joined: what the authors keep in one tensor.
        swapped: beginnings of modulations whose halves, scale and shift, diffusers has the other way round.
    """
    left = dict(tensors)
    for name in [name for name in left if name.startswith(swapped)]:
        left[name] = torch.cat(left[name].chunk(2)[::-1])
    for parts, place in joined:
        for name in [name for name in left if parts[-1] in name]:
            block, kind = name.split(parts[-1])
            pieces = [f"{block}{part}{kind}" for part in parts]
            if all(piece in left for piece in pieces):
                left[f"{block}{place}{kind}"] = torch.cat([left.pop(piece) for piece in pieces])
    return {renamed_by(rules, name): tensor for name, tensor in left.items()}


def flux_names(model: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of a `FluxTransformer2DModel` under the names of Black Forest Labs."""
    return authors_names(FLUX, FLUX_JOINED, ("norm_out.linear.",), tensors)


def sd3_names(model: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of a `SD3Transformer2DModel` under the names of Stability AI."""
    last = model.config.num_layers - 1  # its text stream ends with it, and is modulated as the output is
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    return authors_names(SD3, SD3_JOINED, swapped, tensors)


# names that authors and diffusers share, by their beginning
SHARED = {
    "SD3Transformer2DModel": ("context_embedder.",),
    "WanTransformer3DModel": ("blocks.", "patch_embedding."),
    "QwenImageTransformer2DModel": ("",),
}


def unknown_name(model: Any) -> str | None:
    """A tensor that has no name there, if there is one.

    Args:
        model: the meta device is enough.
    """
    kind, tensors = type(model).__name__, dict(model.state_dict())
    shared = SHARED.get(kind, ())
    left = (name for name in NAMES[kind](model, tensors) if name in tensors and not name.startswith(shared))
    return next(left, None)


NAMES: dict[str, Callable[[Any, Tensors], dict[str, torch.Tensor]]] = {
    "UNet2DConditionModel": unet_names,
    "FluxTransformer2DModel": flux_names,
    "SD3Transformer2DModel": sd3_names,
    "WanTransformer3DModel": lambda model, tensors: authors_names(WAN, (), (), tensors),
    "QwenImageTransformer2DModel": lambda model, tensors: dict(tensors),  # published in diffusers' naming
}
