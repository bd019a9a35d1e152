"""Tiny diffusion transformers of every family, with random weights everywhere, and inputs for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import diffusers
import networks
import torch
from torch import nn
from torch.utils._pytree import tree_map_with_path

from gfprune_cli.inputs.examples import Sizes, example_inputs

SMALL = Sizes(frames=2, height=4, width=4, text=5)

# class and configuration: head_dim 8, four heads, two blocks of every sort
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 6,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 12,
            "sample_size": 8,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 2, 2),
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 12,
            "sample_size": 8,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 12,
        },
    ),
    "stable-audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "cross_attention_input_dim": 12,
            "time_proj_dim": 16,
            "global_states_input_dim": 12,
        },
    ),
}


def variant(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    cls, config = ZOO[name]
    return cls, {**config, **changes}


ZOO |= {
    "sd3.5": variant("sd3", qk_norm="rms_norm", dual_attention_layers=(0,)),
    "sana-sprint": variant("sana", qk_norm="rms_norm_across_heads", guidance_embeds=True),
    "cogvideox-rotary": variant("cogvideox", use_rotary_positional_embeddings=True, patch_size_t=2),
    "wan-image": variant("wan", image_dim=12, added_kv_proj_dim=32),
}


HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
ROPE = {"axes_dims_rope": (4, 2, 2)}

# classes without a rule or inputs of their own, made of the same blocks; shapes of what their forward takes
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ChromaTransformer2DModel": (
        {
            **HEADS,
            **ROPE,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {
            "hidden_states": (1, 4, 16),
            "encoder_hidden_states": (1, 5, 12),
            "timestep": (1,),
            "img_ids": (4, 3),
            "txt_ids": (5, 3),
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 5, 12), "timestep": (1,)},
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 4,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 12,
        },
        {
            "hidden_states": (1, 4, 8, 8),
            "encoder_hidden_states": (1, 5, 12),
            "timestep": (1,),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 2, 2),
        },
        {
            "hidden_states": (1, 4, 2, 4, 4),
            "encoder_hidden_states": (1, 5, 12),
            "timestep": torch.tensor([7]),
            "encoder_attention_mask": torch.ones(1, 5),
            "pooled_projections": (1, 16),
            "guidance": (1,),
        },
    ),
    "QwenImageTransformer2DModel": (
        {**HEADS, **ROPE, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12},
        {
            "hidden_states": (1, 4, 16),
            "encoder_hidden_states": (1, 5, 12),
            "encoder_hidden_states_mask": torch.ones(1, 5),
            "timestep": (1,),
            "img_shapes": [(1, 2, 2)],
        },
    ),
    "Flux2Transformer2DModel": (
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        {
            "hidden_states": (1, 4, 16),
            "encoder_hidden_states": (1, 5, 12),
            "timestep": (1,),
            "img_ids": (4, 4),
            "txt_ids": (5, 4),
            "guidance": (1,),
        },
    ),
}


def build_other(name: str) -> tuple[Any, dict[str, Any]]:
    """A network of `OTHERS` with random weights, and random inputs for it."""
    config, shapes = OTHERS[name]
    source = torch.Generator().manual_seed(1)

    def draw(shape: Any) -> Any:
        if not isinstance(shape, tuple):
            return shape
        drawn = torch.randn(shape, generator=source, dtype=torch.float64)
        return drawn.abs() + 5 if len(shape) == 1 else drawn

    model = randomise(getattr(diffusers, name)(**config), 0, torch.float64)
    return model, {key: draw(shape) for key, shape in shapes.items()}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One of `ZOO` on the CPU; norms are near one, and no projection is zero."""
    cls, config = ZOO[name]
    return randomise(getattr(diffusers, cls)(**config), seed, dtype)


def network_and_inputs(name: str) -> tuple[Any, dict[str, Any]]:
    """One of `ZOO`, or of `NETWORKS`, in float32, and random inputs for it."""
    if name in ZOO:
        model = build(name, dtype=torch.float32)
        return model, inputs(model)
    model = networks.build(name)
    return model, networks.inputs(model)


def randomise(model: Any, seed: int, dtype: torch.dtype) -> Any:
    source = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        scale = 1.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.3
        one = float("norm" in key and parameter.ndim == 1 and key.endswith("weight"))
        parameter.data.copy_(one + scale * noise)
    nn.Module.to(model, dtype)
    return model.eval().requires_grad_(False)


def meta(name: str) -> Any:
    """One of `ZOO` without weights."""
    cls, config = ZOO[name]
    with torch.device("meta"):
        return getattr(diffusers, cls)(**config)


def inputs(model: Any, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one random sample."""
    source = torch.Generator().manual_seed(seed)

    def draw(path: Any, value: Any) -> Any:
        key = str(path[0].key)
        if not isinstance(value, torch.Tensor) or key.endswith("mask"):
            return value
        if "rotary" in key:  # the second of two is the sine
            angles = torch.arange(value.numel(), dtype=torch.float64).view(value.shape) / 7
            return torch.sin(angles) if path[1].idx else torch.cos(angles)
        if not value.is_floating_point():
            return torch.randint(1, 10, value.shape, generator=source)
        drawn = torch.randn(value.shape, generator=source, dtype=torch.float64)
        if key in ("timestep", "guidance", "ofs"):
            drawn = 5 + drawn.abs()
        if key.endswith("ids"):
            drawn = torch.arange(value.numel()).view(value.shape) % 5
        return drawn.to(value.dtype)

    made: dict[str, Any] = tree_map_with_path(draw, example_inputs(model, SMALL))
    return made


@contextmanager
def double_precision() -> Iterator[None]:
    """Let diffusers compute in double precision where it asks for single.

    Norms, rotary embeddings and linear attention round to single precision, which would hide all differences
    below 1e-7.
    """
    to = torch.Tensor.to

    def promote(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def convert(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            args = tuple(map(promote, args))
            kwargs = {key: promote(value) for key, value in kwargs.items()}
        return to(tensor, *args, **kwargs)

    def single(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to(tensor, torch.float32)

    with patch.object(torch.Tensor, "to", convert), patch.object(torch.Tensor, "float", single):
        yield
